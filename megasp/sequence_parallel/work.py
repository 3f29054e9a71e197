"""What the attention of one microbatch is made of: the blocks between ring ranks, and the schedule that brings them."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from megasp.sequence_parallel.blocks import ANTICAUSAL, Block, Mask, blocks
from megasp.sequence_parallel.packing import Pack, packed
from megasp.sequence_parallel.schedules import SCHEDULES, Schedule, Task
from megasp.shard_map import Ranges

Documents = Sequence[np.ndarray]
"""Per sample of the microbatch, the positions at which its documents begin: int64, ascending, the first is 0."""


class Work:
    """The blocks of every pair of ring ranks (computed once, when asked for), and who computes them when.

    Args:
        held: positions of each ring rank (`ShardMap.by_ring`).
        mask: window and sinks.
        documents: of each sample; without it each sample is one document.
        comm: name of the schedule.
        parts: groups of kv heads that are sent one after another, by schedules that do so.
    """

    def __init__(
        self,
        held: tuple[Ranges, ...],
        mask: Mask = Mask(),  # noqa: B008 (frozen)
        documents: Documents | None = None,
        comm: str = "p2p",
        parts: int = 1,
    ) -> None:
        self.held, self.mask = held, mask
        self._rows: list[tuple[int | None, Sequence[int]]] = [(None, (0,))]
        if documents is not None and any(len(starts) > 1 for starts in documents):
            self._rows = list(enumerate([list(map(int, starts)) for starts in documents]))
        self._blocks: dict[tuple[int, int], tuple[Block, ...]] = {}
        self._packed: dict[tuple[int, int], tuple[Block | Pack, ...]] = {}
        self._comm, self._parts = comm, parts

    @cached_property
    def _pairs(self) -> dict[tuple[int, int], int]:
        """(owner of queries, owner of keys) -> (query, key) pairs, where there are some."""
        ranks = range(len(self.held))
        counts = {(q, k): sum(block.pairs for block in self._between(q, k)) for q in ranks for k in ranks}
        return {owners: count for owners, count in counts.items() if count}

    @cached_property
    def schedule(self) -> Schedule:
        """Who computes them when, and what travels, where the owners are ranks."""
        return SCHEDULES[self._comm](len(self.held), self._pairs, self._parts)

    @property
    def documents(self) -> list[Sequence[int]] | None:
        """Where documents begin in each sample; None where every sample is one."""
        return None if self._rows[0][0] is None else [starts for _, starts in self._rows]

    def _between(self, q: int, k: int) -> Iterator[Block]:
        for row, starts in self._rows:
            yield from blocks(self.held[q], self.held[k], self.mask, starts, row)

    def blocks(self, q: int, k: int) -> tuple[Block, ...]:
        """The blocks between the queries of ring rank `q` and the keys of ring rank `k`."""
        if (q, k) not in self._blocks:
            self._blocks[q, k] = tuple(self._between(q, k))
        return self._blocks[q, k]

    def calls(self, q: int, k: int, varlen: bool) -> tuple[Block | Pack, ...]:
        """The same as calls of a kernel, which may take many blocks at once."""
        if not varlen:
            return self.blocks(q, k)
        if (q, k) not in self._packed:
            self._packed[q, k] = tuple(packed(self.blocks(q, k)))
        return self._packed[q, k]

    @property
    def whole(self) -> Block | None:
        """The only block, where there is one alone: nothing is merged then."""
        only = self.blocks(0, 0) if len(self.held) == 1 and self.schedule.parts == 1 else ()
        return only[0] if len(only) == 1 and only[0].kind != ANTICAUSAL and only[0].row is None else None

    def tasks(self, rank: int) -> list[Task]:
        """Everything that `rank` computes in a forward."""
        return [task for step in self.schedule.forward for task in step.tasks if task.rank == rank]

    def pairs(self, task: Task) -> float:
        """(query, key) pairs of a task: its share of the attention's work, up to heads and samples."""
        return self._pairs[task.q, task.k] / self.schedule.parts
