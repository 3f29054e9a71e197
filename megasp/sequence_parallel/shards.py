"""Which positions each rank holds, chosen by the attention work of a microbatch's documents.

One long document is best dealt in zigzag, and for LightSeq, which balances by itself, in contiguous shards. Packed
documents are not: a rank whose part lies inside long documents has more to do than one that holds beginnings. So with
documents the map is chosen for each microbatch, among

    contiguous    short documents stay on one rank, and next to nothing is sent
    zigzag        a few long ones
    balanced      parts of the sequence dealt by their work, 2, 4 or 8 a ring rank

by running the microbatch's own schedule on paper: the shortest is taken, or of those within 5% of it the one that sends
least. This is a function of the documents alone, which every rank knows, so the ranks need not ask each other; loader
and attention ask the same object, and tokens, labels, positions, masks and loss follow.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Protocol

import numpy as np

from megasp.sequence_parallel.blocks import Mask
from megasp.sequence_parallel.schedules import simulate
from megasp.sequence_parallel.work import Documents, Work
from megasp.shard_map import ShardMap

PARTS = (2, 4, 8)
"""Parts of a ring rank: more of them balance better, and make more and smaller blocks."""

WORTH = 1.05
"""How much longer a map may take that sends less."""

KEPT = 256
"""Microbatches whose map is remembered: those that the loader reads ahead are asked for again."""


class Shards(Protocol):
    """What loader and attention ask."""

    def of(self, documents: Documents | None) -> ShardMap:
        """The positions of each rank in a microbatch with these documents; None where they are not told apart."""


def shards(
    seq_length: int,
    ring: int,
    ulysses: int,
    comm: str = "p2p",
    mask: Mask = Mask(),  # noqa: B008
    chunks: int = 1,
    split: int = 1,
) -> Shards:
    """The shards of a run.

    Args:
        seq_length: tokens of a sample; ring * ulysses must divide it.
        comm: how the ring's ranks exchange.
        mask: window and sinks.
        chunks: of the sequence that layers compute one after another, with a ring of one rank.
        split: tensor-parallel ranks that share a rank's part of the residual stream.
    """
    if chunks > 1:
        assert ring == 1
        return ShardMap.chunked(seq_length, ulysses, chunks, split)
    if ring == 1:
        return ShardMap.contiguous(seq_length, ring * ulysses)
    return DocumentShards(seq_length, ring, ulysses, comm, mask)


class DocumentShards:
    """Chooses a map for each microbatch; arguments as above."""

    def __init__(self, seq_length: int, ring: int, ulysses: int, comm: str, mask: Mask) -> None:
        self.seq_length, self.ring, self.ulysses, self.comm, self.mask = seq_length, ring, ulysses, comm, mask
        self.contiguous = ShardMap.contiguous(seq_length, ring * ulysses)
        self.zigzag = ShardMap.zigzag(seq_length, ring, ulysses)
        self.one_document = self.contiguous if comm == "lightseq" else self.zigzag
        self._chosen: OrderedDict[bytes, ShardMap] = OrderedDict()
        self._lock = Lock()  # the loader asks from a thread of its own

    def of(self, documents: Documents | None) -> ShardMap:
        if documents is None or all(len(starts) == 1 for starts in documents):
            return self.one_document
        # Every sample begins with 0, so joined they can be told apart again.
        key = np.concatenate(documents).tobytes()
        with self._lock:
            if key not in self._chosen:
                self._chosen[key] = self._choose(documents)
                if len(self._chosen) > KEPT:
                    self._chosen.popitem(last=False)
            return self._chosen[key]

    def _choose(self, documents: Documents) -> ShardMap:
        costs = [(*self._cost(candidate, documents), candidate) for candidate in self._candidates(documents)]
        shortest = min(time for time, _, _ in costs)
        return min((cost for cost in costs if cost[0] <= WORTH * shortest), key=lambda cost: (cost[1], cost[0]))[2]

    def _candidates(self, documents: Documents) -> Iterator[ShardMap]:
        yield from (self.contiguous, self.zigzag)
        for parts in (each * self.ring for each in PARTS):
            if self.seq_length % parts == 0:
                work = work_of_parts(self.seq_length, parts, self.mask, documents)
                yield ShardMap.balanced(self.seq_length, self.ring, self.ulysses, work)

    def _cost(self, candidate: ShardMap, documents: Documents) -> tuple[float, int]:
        """(pairs that are computed one after another, messages) of a forward."""
        work = Work(candidate.by_ring(self.ulysses), self.mask, documents, self.comm)
        steps = work.schedule.forward
        return simulate(steps, self.ring, work.pairs)[0], sum(len(step.messages) for step in steps)


def work_of_parts(seq_length: int, parts: int, mask: Mask, documents: Documents) -> list[float]:
    """(query, key) pairs of the queries in each of `parts` equal parts of the sequence, summed over the samples."""
    bounds = np.arange(parts + 1, dtype=np.int64) * (seq_length // parts)
    return np.diff(sum(_pairs_before(bounds, seq_length, mask, starts) for starts in documents)).tolist()


def _pairs_before(positions: np.ndarray, seq_length: int, mask: Mask, starts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Pairs of the queries before each position, in one sample."""
    starts = np.asarray(starts, np.int64)
    of_documents = mask.pairs(np.diff(np.append(starts, seq_length)))
    before = np.concatenate(([0], np.cumsum(of_documents)))
    document = np.searchsorted(starts, positions, side="right") - 1
    return before[document] + mask.pairs(positions - starts[document])
