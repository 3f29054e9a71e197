"""Attention as a list of block computations, pure numbers: which queries see which keys, by what mask.

A query at position i sees the keys j <= i of its own document, at most `window` positions back, or among the first
`sinks` of the document. Cut along documents, ranges and the edges of the mask, this is a list of rectangles of which
each is one of three kinds, so that every kernel serves every mask:

    full       causal     anticausal       a window of 4 over 8 keys, queries in tiles of 4:
    x x x      x . .      x x x                   anticausal | causal
    x x x      x x .      . x x                   . x x x    | x . . .
    x x x      x x x      . . x                   . . x x    | x x . .     (a further full block stands between them
                                                  . . . x    | x x x .      where a tile is shorter than the window)
                                                             | x x x x

No block is empty and no row of a block is without a key: kernels disagree on what those give (and the CPU's dies).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megasp.shard_map import Ranges

FULL, CAUSAL, ANTICAUSAL = "full", "causal", "anticausal"

Rectangle = tuple[int, int, int, int, str]
"""Positions of queries [a, b) and keys [c, d), and the kind."""


@dataclass(frozen=True)
class Mask:
    """What a query sees besides "its own document, up to itself".

    Args:
        window: keys before itself that it sees (0: itself alone); all without it.
        sinks: keys at the start of the document that are seen beyond the window (arXiv 2309.17453).
        causal: without it a query sees its whole document.
    """

    window: int | None = None
    sinks: int = 0
    causal: bool = True

    def pairs(self, queries: np.ndarray) -> np.ndarray:
        """(query, key) pairs of the first `queries` queries of a document that is at least so long."""
        assert self.causal
        # A query sees itself, the window, and beyond that the sinks: all before it, up to so many.
        most = 1 << 40 if self.window is None else self.window + 1 + self.sinks
        rest = np.maximum(queries - most, 0)
        return (queries * (queries + 1) - rest * (rest + 1)) // 2


class Block(NamedTuple):
    """One call of a kernel: columns of the local tensors, and the positions that these have in the sample.

    `row` is the sample of the microbatch, or None for all of them.
    """

    row: int | None
    q: tuple[int, int]
    k: tuple[int, int]
    kind: str
    q_position: int
    k_position: int

    @property
    def pairs(self) -> int:
        """(query, key) pairs that see each other."""
        queries, keys = self.q[1] - self.q[0], self.k[1] - self.k[0]
        return queries * keys if self.kind == FULL else queries * (queries + 1) // 2


def blocks(
    queries: Ranges, keys: Ranges, mask: Mask, starts: Sequence[int] = (0,), row: int | None = None
) -> Iterator[Block]:
    """The blocks between what one rank holds of the queries and what another (or the same) holds of the keys.

    Args:
        queries, keys: positions, in the order of the local tensors.
        starts: positions at which documents begin, ascending, the first is 0.
    """
    q_column = 0
    for a, b in queries:
        k_column = 0
        for c, d in keys:
            for q0, q1, k0, k1, kind in _visible(a, b, c, d, mask, starts) if c < b or not mask.causal else ():
                q, k = q_column - a, k_column - c  # from position to column
                yield Block(row, (q0 + q, q1 + q), (k0 + k, k1 + k), kind, q0, k0)
            k_column += d - c
        q_column += b - a


def _visible(a: int, b: int, c: int, d: int, mask: Mask, starts: Sequence[int]) -> Iterator[Rectangle]:
    """Rectangles between queries [a, b) and keys [c, d), document by document."""
    first = bisect_right(starts, max(a, c)) - 1 if c > a else bisect_right(starts, a) - 1
    for number in range(first, len(starts)):
        begin = starts[number]
        end = starts[number + 1] if number + 1 < len(starts) else max(b, d)
        if begin >= b or begin >= d:
            return
        q0, q1, k0, k1 = max(a, begin), min(b, end), max(c, begin), min(d, end)
        if q0 < q1 and k0 < k1:
            yield from _in_document(q0, q1, k0, k1, begin, mask)


def _in_document(a: int, b: int, c: int, d: int, begin: int, mask: Mask) -> Iterator[Rectangle]:
    """Rectangles between queries and keys of the document that starts at `begin`."""
    if not mask.causal:
        yield a, b, c, d, FULL
        return
    if mask.window is None or b - 1 - c <= mask.window:
        yield from _causal(a, b, c, d)
        return
    window = mask.window
    for q0 in range(a, b, max(window, 1)) if c < b and a - window < d else ():
        yield from _windowed(q0, min(b, q0 + max(window, 1)), c, d, window)
    # A sink key is seen beyond the window: causal as if the query stood window + 1 positions earlier.
    shift = window + 1
    for q0, q1, k0, k1, kind in _causal(a - shift, b - shift, c, min(d, begin + mask.sinks)):
        yield q0 + shift, q1 + shift, k0, k1, kind


def _causal(a: int, b: int, c: int, d: int) -> Iterator[Rectangle]:
    """Keys at or before the query."""
    if b <= c or d <= c:
        return
    if c < min(d, a):
        yield a, b, c, min(d, a), FULL
    first, last = max(a, c), min(b, d)
    if first < last:
        yield first, last, first, last, CAUSAL
        if last < b:
            yield last, b, first, last, FULL


def _windowed(a: int, b: int, c: int, d: int, window: int) -> Iterator[Rectangle]:
    """Keys in the window of a tile of at most `window` queries (one query where that is 0).

    keys   a - window ...... b - window ............ a ......... b
           anticausal        full                    causal
    """
    yield from _causal(a, b, max(c, a), d)
    if window == 0:
        return
    low, high = max(c, b - window), min(d, a)
    if low < high:
        yield a, b, low, high, FULL
    low, high = max(c, a - window), min(d, b - window)
    if low < high:
        first, last = low + window, high + window  # the last queries that see the first and the last of these keys
        if a < first:
            yield a, first, low, high, FULL
        yield first, last, low, high, ANTICAUSAL
