"""Boxes and pieces against numpy: a piece is a slice, a parameter is slices stacked, and a cut of rows is the same cut
of the local tensor."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.parameters import Box, Piece, local_shape, placed, rows_of, split, whole
from tests.unit.property import sample

SHAPE = (6, 5, 4)


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    """Any non-empty box of a tensor."""

    def span(size: int) -> st.SearchStrategy[tuple[int, int]]:
        ends = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda e: e[0] != e[1])
        return ends.map(lambda e: (min(e), abs(e[0] - e[1])))

    spans = st.tuples(*(span(size) for size in shape))
    return spans.map(lambda items: Box(tuple(a for a, _ in items), tuple(n for _, n in items)))


def canonical(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor whose every element is different, also between names."""
    return np.arange(np.prod(shape)).reshape(shape) + 1000 * ord(name[0])


def local(pieces: tuple[Piece, ...]) -> np.ndarray:
    """The local tensor by definition: slices of canonical tensors, stacked along dim 0."""
    return np.concatenate([canonical(p.name, p.shape)[p.box.slices] for p in pieces])


@sample(40)
@given(a=boxes(SHAPE), b=boxes(SHAPE))
def test_intersection(a: Box, b: Box) -> None:
    marks = np.zeros(SHAPE, int)
    marks[a.slices] += 1
    marks[b.slices] += 1
    common = a.intersect(b)
    if common is None:
        assert marks.max() == 1
        return
    assert common == b.intersect(a) and common.numel == (marks == 2).sum()
    assert (marks[common.slices] == 2).all()


@sample(40)
@given(box=boxes(SHAPE), inner=boxes(SHAPE))
def test_relative_box_finds_the_same_elements(box: Box, inner: Box) -> None:
    tensor = canonical("a", SHAPE)
    common = box.intersect(inner)
    if common is not None:
        part = tensor[box.slices][common.relative_to(box.start).slices]
        assert np.array_equal(part, tensor[common.slices])


def test_boxes_of_other_ranks_do_not_mix() -> None:
    with pytest.raises(ValueError):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_split_is_numpys(dim: int, parts: int) -> None:
    shape = (8, 4, 12)
    tensor = canonical("a", shape)
    for index, expected in enumerate(np.split(tensor, parts, dim)):
        piece = split("a", shape, index, parts, dim)
        assert np.array_equal(tensor[piece.box.slices], expected) and piece.shape == shape
    assert split("a", shape, 0, 1) == whole("a", shape)


def test_split_must_divide() -> None:
    with pytest.raises(AssertionError):
        split("a", (6, 4), 0, 4)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Piece, ...]:
    """Some pieces that stack: boxes of tensors with equal trailing extents."""
    trailing = draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    pieces = []
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)):
        rows, start = draw(st.integers(1, 6)), draw(st.integers(0, 3))
        offset = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        shape = (start + rows + 1, *(t + o + 1 for t, o in zip(trailing, offset, strict=True)))
        pieces.append(Piece(name, shape, Box((start, *offset), (rows, *trailing)), decay=draw(st.booleans())))
    return tuple(pieces)


@sample(40)
@given(pieces=parameters())
def test_placed(pieces: tuple[Piece, ...]) -> None:
    """Every piece is found in the local tensor where `placed` says, and the places partition it."""
    tensor = local(pieces)
    assert tensor.shape == local_shape(pieces)
    seen = np.zeros(tensor.shape, int)
    for piece, box in placed(pieces):
        assert np.array_equal(tensor[box.slices], canonical(piece.name, piece.shape)[piece.box.slices])
        seen[box.slices] += 1
    assert (seen == 1).all()


@sample(60)
@given(pieces=parameters(), data=st.data())
def test_rows_of(pieces: tuple[Piece, ...], data: st.DataObject) -> None:
    """ZeRO's cut: the pieces of rows [a, b) make up rows [a, b) of the local tensor, facts and order kept."""
    tensor = local(pieces)
    rows = len(tensor)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    cut = rows_of(pieces, start, stop)
    if start == stop:
        assert cut == ()
        return
    assert np.array_equal(local(cut), tensor[start:stop])
    facts = {piece.name: piece for piece in pieces}
    assert all(dataclasses.replace(piece, box=facts[piece.name].box) == facts[piece.name] for piece in cut)
    middle = data.draw(st.integers(start, stop))
    assert rows_of(cut, 0, middle - start) == rows_of(pieces, start, middle), "a cut of a cut is a cut"


@sample(40)
@given(pieces=parameters(), ranks=st.integers(1, 7))
def test_uneven_shards_partition(pieces: tuple[Piece, ...], ranks: int) -> None:
    rows = local_shape(pieces)[0]
    each = -(-rows // ranks)
    shards = [rows_of(pieces, min(rows, r * each), min(rows, (r + 1) * each)) for r in range(ranks)]
    assert np.array_equal(np.concatenate([local(shard) for shard in shards if shard]), local(pieces))


def test_replicas() -> None:
    piece = whole("a", (4,))
    assert piece.with_replicas(1, 2, partial=True) == dataclasses.replace(piece, replica=1, replicas=2, partial=True)
    assert not piece.with_replicas(0, 1, partial=True).partial, "one rank knows the whole gradient"
    assert piece.with_facts(init_std=0.5, decay=False).init_std == 0.5 and piece.init_std == 0.0
