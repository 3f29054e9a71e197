"""What travels between ring ranks: several tensors of different dtypes in one contiguous buffer, one message."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """Tensors that are views of one buffer of bytes. Writing to them writes what will be sent."""

    buffer: Tensor
    tensors: tuple[Tensor, ...]

    @classmethod
    def empty(cls, like: Sequence[Tensor]) -> "Parcel":
        """Contiguous tensors of the shapes and dtypes of `like`."""
        size = sum(x.numel() * x.itemsize for x in like)
        return cls.over(torch.empty(size, dtype=torch.uint8, device=like[0].device), like)

    @classmethod
    def over(cls, buffer: Tensor, like: Sequence[Tensor]) -> "Parcel":
        """The same in a buffer that is there."""
        # Wide dtypes come first: a view of bytes must begin at a multiple of its own item size.
        assert all(x.itemsize >= y.itemsize for x, y in pairwise(like))
        sizes = [x.numel() * x.itemsize for x in like]
        return cls(
            buffer, tuple(part.view(x.dtype).view(x.shape) for part, x in zip(buffer.split(sizes), like, strict=True))
        )

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Parcel":
        """A copy of `tensors`, which may have any strides."""
        parcel = cls.empty(tensors)
        for own, tensor in zip(parcel.tensors, tensors, strict=True):
            own.copy_(tensor)
        return parcel

    @classmethod
    def zeros(cls, like: Sequence[Tensor]) -> "Parcel":
        """Sums that begin at zero."""
        parcel = cls.empty(like)
        parcel.buffer.zero_()
        return parcel

    def add_(self, other: "Parcel") -> None:
        for own, tensor in zip(self.tensors, other.tensors, strict=True):
            own.add_(tensor)


class Partial:
    """The attention of some queries over the keys seen so far: out [B, N, S, H], lse [B, N, S], in fp32 or wider.

    Rows that have seen no key have out = 0 and lse = -inf.
    """

    def __init__(self, q: Tensor) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = torch.zeros_like(q, dtype=wide)  # in q's order of dims, which the next layer takes without a copy
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)

    def merge(self, out: Tensor, lse: Tensor, index: tuple[slice, ...] = ()) -> None:
        """Add what further keys gave to the rows `index` (samples, heads, columns): softmax over both is a mean of
        the outputs weighted by exp(lse)."""
        _merge_(self.out[index], self.lse[index], out, lse)

    def merge_columns(self, out: Tensor, lse: Tensor, rows: slice, heads: slice, columns: Tensor) -> None:
        """The same for columns anywhere, int64 [T], of which each comes once."""
        whole, whole_lse = self.out[rows, heads], self.lse[rows, heads]
        held, held_lse = whole.index_select(2, columns), whole_lse.index_select(2, columns)
        _merge_(held, held_lse, out, lse)
        whole.index_copy_(2, columns, held)
        whole_lse.index_copy_(2, columns, held_lse)


def _merge_(held: Tensor, held_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    total = torch.logaddexp(held_lse, lse)
    base = total.masked_fill(total == -torch.inf, 0)  # rows still without a key: weights exp(-inf), not NaN
    held.mul_((held_lse - base).exp_()[..., None]).addcmul_(out.to(held.dtype), (lse - base).exp_()[..., None])
    held_lse.copy_(total)
