"""A tensor of Megatron's, wherever its parts stand: what both of its formats are read as.

    torch_dist   boxes of a global tensor in `__RANK_N.distcp`, by PyTorch's distributed checkpoint
    mp_rank_*    what each tensor- and pipeline-parallel rank held, a file each

Nothing is read before it is asked for, and then only the parts that the wanted rows meet.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasp.errors import CheckpointError
from megasp.parameters import Box


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and what gives its elements: a view of a file's mapping."""

    box: Box
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """One tensor of the whole model.

    Attributes:
        key: its name there.
        dtype, shape: of it.
        parts: they tile it.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def rows(self, ranges: Sequence[range], dtype: torch.dtype) -> Tensor:
        """Some of its rows, range after range, as a tensor of their own.

        Raises:
            CheckpointError: parts of it are missing, or are not what they are said to be.
        """
        others = self.shape[1:]
        out = torch.empty(sum(map(len, ranges)), *others, dtype=dtype)
        filled = 0
        for part in self.parts:
            first, wanted = 0, []
            for rows in ranges:
                box = Box((rows.start, *(0 for _ in others)), (len(rows), *others))
                common = part.box.intersect(box)
                if common is not None:
                    wanted.append((common, common.relative_to((rows.start - first, *box.start[1:]))))
                first += len(rows)
            if not wanted:
                continue
            there = part.read()
            if there.shape != part.box.size or there.dtype != self.dtype:
                got = f"a part of {self.key} is {list(there.shape)} of {there.dtype}"
                rule = f"its metadata says {list(part.box.size)} of {self.dtype}"
                raise CheckpointError(got, rule, "copy the checkpoint again")
            for common, here in wanted:
                out[here.slices].copy_(there[common.relative_to(part.box.start).slices])
                filled += common.numel
        if filled != out.numel():
            rule = f"its parts give {filled} of {out.numel()} elements"
            raise CheckpointError(f"{self.key} is not whole", rule, "copy the checkpoint again")
        return out


@dataclass(frozen=True)
class Stored:
    """What a checkpoint of Megatron's holds.

    Attributes:
        sources: by their key in `torch_dist`'s words, a layer's with its number; `optimizer.state.KIND.` before those
            of the optimizer.
        common: what is not tensors: `args`, `iteration`, the optimizer's settings.
        objects: names of what else is stored.
    """

    sources: Mapping[str, Source]
    common: Mapping[str, Any]
    objects: Collection[str] = ()
