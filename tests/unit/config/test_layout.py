"""The arithmetic of the rank grid: every factorisation of 1 to 16 ranks over the six axes, and layout names."""

import itertools
import math

import pytest

from megasp.config.layout import AXES, UNIONS, Layout
from megasp.errors import ConfigError


def factorisations(world_size: int) -> list[Layout]:
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [Layout(*sizes) for sizes in itertools.product(divisors, repeat=6) if math.prod(sizes) == world_size]


def test_how_many() -> None:
    """Of 2^k: the ways to put k twos into six boxes; of two primes: 6 x 6."""
    assert [len(factorisations(n)) for n in (1, 2, 4, 8, 16, 15)] == [1, 6, 21, 56, 126, 36]


@pytest.mark.parametrize("world_size", range(1, 17))
def test_every_factorisation(world_size: int) -> None:
    ranks = list(range(world_size))
    for layout in factorisations(world_size):
        assert layout.world_size == world_size
        places = [layout.coordinates(rank) for rank in ranks]
        for rank, at in zip(ranks, places, strict=True):
            assert layout.rank(at) == rank
            assert list(at) == list(reversed(AXES)) and all(0 <= at[axis] < getattr(layout, axis) for axis in AXES)
            formula = ((at["pp"] * layout.dp_outer + at["dp_outer"]) * layout.dp_inner + at["dp_inner"]) * layout.ring
            formula = ((formula + at["ring"]) * layout.ulysses + at["ulysses"]) * layout.tp + at["tp"]
            assert formula == rank, f"not the formula of DESIGN.md: {layout}"
        for axes in [(axis,) for axis in AXES] + list(UNIONS.values()):
            groups = {tuple(layout.group(axes, rank)) for rank in ranks}
            assert sorted(itertools.chain(*groups)) == ranks, f"{axes} of {layout.name} do not partition the ranks"
            assert {len(group) for group in groups} == {math.prod(getattr(layout, axis) for axis in axes)}
            for group in groups:
                assert list(group) == sorted(group)
                rest = [[places[rank][axis] for axis in AXES if axis not in axes] for rank in group]
                assert all(other == rest[0] for other in rest), "a group differs on its own axes alone"


@pytest.mark.parametrize("world_size", range(1, 17))
def test_names_parse_back(world_size: int) -> None:
    layouts = factorisations(world_size)
    for layout in layouts:
        assert Layout.parse(layout.name) == layout, layout.name
        assert Layout.parse("-".join(reversed(layout.name.split("-")))) == layout
    assert len({layout.name for layout in layouts}) == len(layouts)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    layout = Layout.parse("tp2-u2-dp2-pp2")
    assert layout.group(("tp",), 5) == [4, 5]
    assert layout.group(("ulysses",), 5) == [5, 7]
    assert layout.group(("dp_inner",), 5) == [1, 5]
    assert layout.group(("pp",), 5) == [5, 13]
    assert layout.group(UNIONS["dp_cp"], 5) == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tp1", Layout()),
        ("u4", Layout(ulysses=4)),
        ("dp2-tp4", Layout(dp_inner=2, tp=4)),
        ("r3-u2", Layout(ring=3, ulysses=2)),
        ("dpo2", Layout(dp_outer=2)),
        ("dp8-dpo2", Layout(dp_outer=2, dp_inner=4)),
        ("tp2-pp2-u2-r1-dp1", Layout(pp=2, ulysses=2, tp=2)),
        ("zero3-dp2", Layout(dp_inner=2, zero=3)),
        ("dp2-zero0", Layout(dp_inner=2)),
    ],
)
def test_short_names(name: str, layout: Layout) -> None:
    assert Layout.parse(name) == layout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "part ''"),
        ("tp", "part 'tp'"),
        ("tp2u2", "part 'tp2u2'"),
        ("tp2-", "part ''"),
        ("tp-2", "part 'tp'"),
        ("TP2", "part 'TP2'"),
        ("cp2", "part 'cp2'"),
        ("tp2-tp2", "'tp2-tp2', part 'tp2': .*each once"),
        ("dp3-dpo2", r"dpo \(2\) must divide dp \(3\); use dp2"),
        ("dp2-zero4", "ZeRO has the stages 0 to 3; use zero3"),
        ("tp0", "layout axis tp is 0: every axis has at least one rank"),
        ("dp0", "layout axis dp_inner is 0"),
    ],
)
def test_bad_names(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Layout.parse(name)


def test_proposal_for_no_outer_replicas() -> None:
    """The name that the sentence proposes must parse."""
    with pytest.raises(ConfigError) as caught:
        Layout.parse("dp4-dpo0")
    assert "dp0" not in caught.value.fix, str(caught.value)


def test_derived_sizes_and_words() -> None:
    layout = Layout(pp=2, dp_outer=2, dp_inner=3, ring=2, ulysses=4, tp=8)
    assert (layout.dp, layout.cp, layout.world_size) == (6, 8, 768)
    assert layout.name == "tp8-pp2-u4-r2-dp6-dpo2"
    assert layout.describe() == "768 ranks = tensor 8 x pipeline 2 x Ulysses 4 x ring 2 x data 6"
    sharded = Layout(dp_inner=2, ulysses=2, zero=2)
    assert sharded.name == "tp1-pp1-u2-r1-dp2-zero2" and Layout.parse(sharded.name) == sharded
    assert sharded.describe().endswith("x data 2, ZeRO-2 over 4 ranks")
    with pytest.raises(ConfigError, match="layout axis ring is -1"):
        Layout(ring=-1)
