"""Which positions of a sequence each context-parallel rank holds. Pure numbers; nobody else computes a position.

The index of a rank is its place in the `cp` union of axes, ring * ulysses_size + ulysses. A ring rank's positions are
those of its Ulysses ranks one after another, so Ulysses inside the ring needs no map of its own. 16 positions:

    contiguous, ring 4     rank 0 [0, 4)           rank 1 [4, 8)           rank 2 [8, 12)     rank 3 [12, 16)
    zigzag, ring 4         rank 0 [0, 2) [14, 16)  rank 1 [2, 4) [12, 14)  rank 2 ...         rank 3 [6, 8) [8, 10)
    zigzag, ring 2 x       rank 0 [0, 4)           rank 1 [12, 16)         rank 2 [4, 8)      rank 3 [8, 12)
      Ulysses 2            (ring 0: [0, 4) [12, 16))                       (ring 1: [4, 8) [8, 12))
    chunked, 2 chunks      rank 0 [0, 2) [8, 10)   rank 1 [2, 4) [10, 12)  rank 2 ...         rank 3 [6, 8) [14, 16)

Zigzag (Llama 3, arXiv 2407.21783 section 3.3.2) gives every ring rank equally much causal work: one part from the
front, one from the back. Chunked, the i-th parts of all ranks lie side by side, so that what comes later in the
sequence comes later on every rank. With packed documents work is elsewhere: `balanced` deals parts of the sequence by
what each has. `megasp.sequence_parallel.shards` chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of positions, in the order in which they are held."""


@dataclass(frozen=True)
class ShardMap:
    """The positions of every rank, in the order in which the rank holds them.

    Every position of [0, seq_length) belongs to exactly one rank, and all ranks hold equally many.
    """

    seq_length: int
    ranges: tuple[Ranges, ...]

    @classmethod
    def contiguous(cls, seq_length: int, ranks: int) -> "ShardMap":
        """Rank r holds [r * c, (r + 1) * c) with c = seq_length / ranks; `ranks` must divide `seq_length`."""
        assert seq_length % ranks == 0, (seq_length, ranks)
        each = seq_length // ranks
        return cls(seq_length, tuple(((rank * each, (rank + 1) * each),) for rank in range(ranks)))

    @classmethod
    def zigzag(cls, seq_length: int, ring: int, ulysses: int = 1) -> "ShardMap":
        """Ring rank r holds the r-th part from the front and the r-th from the back, split over its Ulysses ranks.

        `ring * ulysses` must divide `seq_length`; an odd seq_length / ring makes the parts at the back one longer.
        """
        assert seq_length % (ring * ulysses) == 0, (seq_length, ring, ulysses)
        each = seq_length // ring
        front, back = each // 2, each - each // 2
        held = (
            _joined(((r * front, (r + 1) * front), (seq_length - (r + 1) * back, seq_length - r * back)))
            for r in range(ring)
        )
        return cls(seq_length, tuple(part for ranges in held for part in _split(ranges, ulysses)))

    @classmethod
    def chunked(cls, seq_length: int, ranks: int, chunks: int, split: int = 1) -> "ShardMap":
        """Parts i of what the ranks hold make up, rank after rank, the i-th of `chunks` chunks of the sequence.

        Where `split` tensor-parallel ranks share what a rank holds, its first part is the first one's, and so on: part
        i of each of them, rank after rank, makes up chunk i. ranks * chunks * split must divide `seq_length`.
        """
        assert seq_length % (ranks * chunks * split) == 0, (seq_length, ranks, chunks, split)
        each = seq_length // (ranks * chunks * split)
        places = (
            [(chunk * ranks + rank) * split + part for part in range(split) for chunk in range(chunks)]
            for rank in range(ranks)
        )
        return cls(seq_length, tuple(_joined(tuple((p * each, (p + 1) * each) for p in held)) for held in places))

    @classmethod
    def balanced(cls, seq_length: int, ring: int, ulysses: int, work: Sequence[float]) -> "ShardMap":
        """Equal parts of the sequence, of which part i has work[i], dealt to the ring ranks so that all have about
        equally much work and equally many parts; each rank's are split over its Ulysses ranks.

        The heaviest parts are dealt first, one to each rank, heavier ones to ranks with less so far. For causal
        attention to one document, in two parts a rank, that is zigzag. `ring` must divide the number of parts, and that
        the sequence.
        """
        parts, each = len(work), seq_length // len(work)
        assert parts % ring == 0 and seq_length % parts == 0 and each * parts // ring % ulysses == 0
        heaviest_first = sorted(range(parts), key=lambda part: -work[part])
        held: list[list[int]] = [[] for _ in range(ring)]
        load = [0.0] * ring
        for first in range(0, parts, ring):
            lightest_first = sorted(range(ring), key=lambda rank: load[rank])
            for rank, part in zip(lightest_first, heaviest_first[first : first + ring], strict=True):
                held[rank].append(part)
                load[rank] += work[part]
        ranges = (_joined(tuple((part * each, (part + 1) * each) for part in sorted(of_rank))) for of_rank in held)
        return cls(seq_length, tuple(share for of_rank in ranges for share in _split(of_rank, ulysses)))

    @property
    def ranks(self) -> int:
        return len(self.ranges)

    @cached_property
    def length(self) -> int:
        """Positions that one rank holds."""
        return self.seq_length // self.ranks

    def of(self, documents: Sequence[np.ndarray] | None) -> "ShardMap":
        """The map of a microbatch with these documents: this one, whatever they are."""
        return self

    def positions(self, rank: int) -> np.ndarray:
        """The global positions that `rank` holds, int64 [length], in local order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges[rank]])

    def take(self, rank: int, sequence: np.ndarray) -> np.ndarray:
        """This rank's shard of the last dim of `sequence` [..., seq_length] -> [..., length]."""
        return np.concatenate([sequence[..., start:stop] for start, stop in self.ranges[rank]], axis=-1)

    def by_ring(self, ulysses: int) -> tuple[Ranges, ...]:
        """The positions of every ring rank: those of its `ulysses` ranks one after another."""
        groups = (self.ranges[first : first + ulysses] for first in range(0, self.ranks, ulysses))
        return tuple(_joined(tuple(item for ranges in group for item in ranges)) for group in groups)


def _joined(ranges: Ranges) -> Ranges:
    """The same positions with neighbouring ranges made one and empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def _split(ranges: Ranges, parts: int) -> list[Ranges]:
    """`ranges` cut into `parts` equal shares, in order."""
    share = sum(stop - start for start, stop in ranges) // parts
    shares, before = [], 0  # `before`: positions in earlier ranges
    for part in range(parts):
        first, last, before, held = part * share, (part + 1) * share, 0, []
        for start, stop in ranges:
            held.append((start + max(0, first - before), min(stop, start + last - before)))
            before += stop - start
        shares.append(tuple((a, b) for a, b in held if a < b))
    return shares
