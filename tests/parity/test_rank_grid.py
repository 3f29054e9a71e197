"""The rank grid: groups on real ranks are the slices that the arithmetic says, for every factorisation."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from megasp import parallel_state, process_group
from megasp.config.layout import AXES, UNIONS, Layout
from megasp.errors import ConfigError
from tests.ranks import run_ranks


def factorisations(world_size: int) -> list[Layout]:
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return [Layout(*sizes) for sizes in itertools.product(divisors, repeat=6) if math.prod(sizes) == world_size]


def _groups_match(layouts: list[Layout]) -> None:
    for layout in layouts:
        state = parallel_state.build(layout, torch.device("cpu"))
        for name, axes in {**{axis: (axis,) for axis in AXES}, **UNIONS}.items():
            expected = layout.group(axes, dist.get_rank())
            axis = state.axes[name]
            ranks = [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)
            assert (ranks, axis.size, ranks[axis.rank]) == (expected, len(expected), dist.get_rank()), (
                layout.name,
                name,
            )


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_groups_on_ranks(world_size: int) -> None:
    layouts = factorisations(world_size)
    run_ranks(_groups_match, world_size, layouts if world_size < 8 else layouts[::6])


def _nodes_of(sizes: list[int]) -> str:
    try:
        process_group.check_nodes_agree(sizes[dist.get_rank()], torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return "agreed"


def test_ranks_agree_on_the_size_of_nodes() -> None:
    assert run_ranks(_nodes_of, 2, [8, 8]) == ["agreed"] * 2
    for said in run_ranks(_nodes_of, 2, [8, 4]):
        assert "nodes of 4 to 8 ranks" in said and "give --nproc-per-node" in said
