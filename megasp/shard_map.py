"""Which positions of a sequence each context-parallel rank holds. Pure numbers; nobody else computes a position.

    contiguous, 4 ranks, 16 positions:   rank 0 [0, 4)   rank 1 [4, 8)   rank 2 [8, 12)   rank 3 [12, 16)

The index of a rank is its place in the `cp` union of axes: ring * ulysses_size + ulysses.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class ShardMap:
    """The positions of every rank, as half-open ranges in the order in which the rank holds them.

    Every position of [0, seq_length) belongs to exactly one rank, and all ranks hold equally many.
    """

    seq_length: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def contiguous(cls, seq_length: int, ranks: int) -> "ShardMap":
        """Rank r holds [r * c, (r + 1) * c) with c = seq_length / ranks; `ranks` must divide `seq_length`."""
        assert seq_length % ranks == 0, (seq_length, ranks)
        each = seq_length // ranks
        return cls(seq_length, tuple(((rank * each, (rank + 1) * each),) for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        return len(self.ranges)

    @cached_property
    def length(self) -> int:
        """Positions that one rank holds."""
        return self.seq_length // self.ranks

    def positions(self, rank: int) -> np.ndarray:
        """The global positions that `rank` holds, int64 [length], in local order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ranges[rank]])

    def take(self, rank: int, sequence: np.ndarray) -> np.ndarray:
        """This rank's shard of the last dim of `sequence` [..., seq_length] -> [..., length]."""
        return np.concatenate([sequence[..., start:stop] for start, stop in self.ranges[rank]], axis=-1)
