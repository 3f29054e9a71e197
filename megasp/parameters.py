"""What a parameter is made of: boxes of canonical tensors. Pure arithmetic.

A *canonical* tensor is an unfused tensor of the whole model under its global name (`layers.17.attention.q.weight`),
the same in every layout. A parameter of this rank is one plain local tensor: some *pieces*, each a box of a canonical
tensor, stacked along dim 0. Tensor parallel 2, rank 1, a fused [q; k; v] weight with 8 query and 2 kv heads of 4:

    local rows  0..16   q.weight [32, D]  rows 16..32
               16..20   k.weight [ 8, D]  rows  4..8
               20..24   v.weight [ 8, D]  rows  4..8

A row-parallel weight is one piece that takes all rows and some columns. Init, the gradient norm, the optimizer,
checkpoints and the planner read this one fact; none of them knows about tensor parallelism.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Box:
    """A half-open box of a tensor: `start[d] <= index[d] < start[d] + size[d]`."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The common box, or None when there is none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def relative_to(self, origin: Sequence[int]) -> "Box":
        """The same box counted from `origin`."""
        return Box(tuple(a - o for a, o in zip(self.start, origin, strict=True)), self.size)


@dataclass(frozen=True)
class Piece:
    """One box of a canonical tensor inside a local parameter.

    Args:
        name: canonical name.
        shape: the canonical tensor's global shape.
        box: which part of it.
        replica: this rank's place among the ranks of one model replica that hold the same box; 0 owns it.
        replicas: how many hold it.
        partial: each replica's gradient is only a share of the gradient; they are summed over the replicas.
        init_std: standard deviation of its initial values; 0 for constants.
        init_mean: mean of its initial values.
        decay: whether weight decay applies to it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    replica: int = 0
    replicas: int = 1
    partial: bool = False
    init_std: float = 0.0
    init_mean: float = 0.0
    decay: bool = True

    def with_replicas(self, replica: int, replicas: int, partial: bool) -> "Piece":
        """The same piece, held by `replicas` neighbouring ranks of which this is number `replica`.

        Args:
            partial: each of them knows only a part of its gradient.
        """
        return replace(self, replica=replica, replicas=replicas, partial=partial and replicas > 1)

    def with_facts(self, **facts: float | bool) -> "Piece":
        """The same piece with other `init_std`, `init_mean` or `decay`."""
        return replace(self, **facts)  # type: ignore[arg-type]


def split(name: str, shape: tuple[int, ...], index: int, parts: int, dim: int = 0) -> Piece:
    """Part `index` of `parts` equal parts of a canonical tensor along `dim`; `parts` must divide it."""
    assert shape[dim] % parts == 0, (name, shape, dim, parts)
    each = shape[dim] // parts
    start, size = [0] * len(shape), list(shape)
    start[dim], size[dim] = index * each, each
    return Piece(name, shape, Box(tuple(start), tuple(size)))


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    """All of a canonical tensor."""
    return Piece(name, shape, Box((0,) * len(shape), shape))


def local_shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Shape of the local tensor that `pieces` make up."""
    return (sum(piece.box.size[0] for piece in pieces), *pieces[0].box.size[1:])


def placed(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Box]]:
    """Each piece with its box in the local tensor."""
    row = 0
    for piece in pieces:
        yield piece, Box((row,) + (0,) * (len(piece.shape) - 1), piece.box.size)
        row += piece.box.size[0]


def rows_of(pieces: Sequence[Piece], start: int, stop: int) -> tuple[Piece, ...]:
    """The pieces of local rows [start, stop): what a rank holds that shards the local tensor along dim 0 (ZeRO)."""
    cut: list[Piece] = []
    for piece, local in placed(pieces):
        low, high = max(start, local.start[0]), min(stop, local.start[0] + local.size[0])
        if low < high:
            first = piece.box.start[0] + low - local.start[0]
            box = Box((first, *piece.box.start[1:]), (high - low, *piece.box.size[1:]))
            cut.append(replace(piece, box=box))
    return tuple(cut)
