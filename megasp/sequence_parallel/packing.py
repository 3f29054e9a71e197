"""Many small blocks in one call of a kernel that takes sequences of varying length (varlen): documents on CUDA.

Blocks of one sample and kind, with queries apart from each other, are laid one after another. An anticausal pack is
laid down backwards, which makes it a causal one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasp.sequence_parallel.blocks import ANTICAUSAL, FULL, Block


@dataclass(frozen=True)
class Lengths:
    """Sequences that lie one after another: ends int32 [n + 1] from 0, and the longest."""

    ends: Tensor
    longest: int


class Pack:
    """Blocks of one sample and kind: their columns and lengths, made once per device."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks, self.row, self.causal = blocks, blocks[0].row, blocks[0].kind != FULL
        self._made: dict[tuple[str, torch.device], tuple[Tensor, Lengths]] = {}

    @property
    def rows(self) -> slice:
        assert self.row is not None
        return slice(self.row, self.row + 1)

    def take(
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], tuple[Lengths, Lengths]]:
        """The columns of tensors [B, heads, S, H] as [T, heads, H], queries first, and the lengths of both."""
        (q_columns, q_lengths), (k_columns, k_lengths) = self.q(queries[0].device), self.k(queries[0].device)
        places = [(x, q_columns) for x in queries] + [(x, k_columns) for x in keys]
        return [x[self.row].index_select(1, columns).transpose(0, 1) for x, columns in places], (q_lengths, k_lengths)

    def q(self, device: torch.device) -> tuple[Tensor, Lengths]:
        """Columns of the queries, int64 [T], and the lengths of the blocks."""
        return self._of("q", device)

    def k(self, device: torch.device) -> tuple[Tensor, Lengths]:
        """The same of the keys."""
        return self._of("k", device)

    def _of(self, side: str, device: torch.device) -> tuple[Tensor, Lengths]:
        if (side, device) not in self._made:
            self._made[side, device] = self._laid([getattr(block, side) for block in self.blocks], device)
        return self._made[side, device]

    def _laid(self, ranges: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Lengths]:
        """Columns int64 [T] and the lengths of the ranges."""
        columns = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        sizes = torch.tensor([0] + [stop - start for start, stop in ranges])
        if self.blocks[0].kind == ANTICAUSAL:
            columns, sizes = columns.flip(0), torch.cat((sizes[:1], sizes[1:].flip(0)))
        lengths = Lengths(sizes.cumsum(0).to(device, torch.int32), int(sizes.max()))
        return columns.to(device), lengths


def packed(blocks: Iterable[Block]) -> list[Block | Pack]:
    """The same blocks, those of one sample that can be done in one call together; others alone."""
    groups: list[list[Block]] = []
    open_groups: dict[tuple[int, str], list[Block]] = {}
    for block in blocks:
        group = open_groups.get((block.row, block.kind)) if block.row is not None else None
        if group is None or block.q[0] < group[-1].q[1]:
            group = []
            groups.append(group)
            if block.row is not None:
                open_groups[block.row, block.kind] = group
        group.append(block)
    return [Pack(group) if len(group) > 1 else group[0] for group in groups]
