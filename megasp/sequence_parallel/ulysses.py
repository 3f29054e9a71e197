"""DeepSpeed-Ulysses (arXiv 2309.14509): attention over a split sequence by exchanging it for a split of the heads.

    before            all-to-all           attention             all-to-all          after
    rank 0  s0 | all heads     ->   all of s | heads 0..N/U   ->   s0 | all heads
    rank 1  s1 | all heads     ->   all of s | heads N/U..    ->   s1 | all heads

Any number of heads from one per rank up works. The rule: rank u of U holds query heads [u N // U, (u + 1) N // U) and
those kv heads that they use; a kv head goes to every rank that uses it, and its gradients are summed on return.

    7 query heads, 7 kv heads, 4 ranks     q 0 | 1 2 | 3 4 | 5 6         kv the same
    8 query heads, 2 kv heads, 4 ranks     q 0 1 | 2 3 | 4 5 | 6 7       kv 0 | 0 | 1 | 1
    6 query heads, 2 kv heads, 4 ranks     q 0 | 1 2 | 3 | 4 5           kv 0 | 0 | 1 | 1

q, k and v travel in one exchange and the output in another, so a layer makes two all-to-alls forward and two backward.
Sent per rank and direction with even heads, f = (U - 1) / U, c local tokens, r copies of each kv head:
f c b (2 dq + 2 r dkv) elements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megasp.collectives import start_all_to_all
from megasp.parallel_state import Axis

LocalAttention = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class HeadShare:
    """The heads of one Ulysses rank: query heads [q0, q1), kv heads [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads of q, k and v."""
        return self.q1 - self.q0, self.k1 - self.k0, self.k1 - self.k0

    def kv_of_queries(self, group: int) -> list[int] | None:
        """The local kv head of each local query head; None where equal groups of queries share them in order.

        Args:
            group: query heads that share a kv head, over all ranks.
        """
        of_each = [head // group - self.k0 for head in range(self.q0, self.q1)]
        queries, kv, _ = self.sizes
        even = queries % kv == 0 and of_each == [head * kv // queries for head in range(queries)]
        return None if even else of_each


@lru_cache
def head_shares(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """The heads of every rank by the rule above; at least one query head each."""
    assert heads >= ranks and heads % kv_heads == 0, (heads, kv_heads, ranks)
    group = heads // kv_heads
    bounds = [rank * heads // ranks for rank in range(ranks + 1)]
    return tuple(HeadShare(a, b, a // group, (b - 1) // group + 1) for a, b in pairwise(bounds))


class _SequenceToHeads(torch.autograd.Function):
    """q [S, B, N, H], k and v [S, B, G, H] -> [U S, B, this rank's heads of each, H]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> tuple[Tensor, ...]:
        shares = head_shares(q.shape[2], k.shape[2], axis.size)
        ctx.axis, ctx.shares, ctx.kv_heads = axis, shares, k.shape[2]
        sends = [_heads_of(share, q, k, v) for share in shares]
        received = [x.new_empty(axis.size * len(x), *x.shape[1:]) for x in sends[axis.rank]]
        start_all_to_all(sends, _by_rank(received, axis), axis).wait()
        return tuple(received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        axis, shares = ctx.axis, ctx.shares
        length, batch, head_dim = gradients[0].shape[0] // axis.size, gradients[0].shape[1], gradients[0].shape[3]
        dq, dk, dv = (
            x.new_empty(length, batch, heads, head_dim)
            for x, heads in zip(gradients, (shares[-1].q1, ctx.kv_heads, ctx.kv_heads), strict=True)
        )
        places = [_heads_of(share, dq, dk, dv) for share in shares]
        copied = sum(share.k1 - share.k0 for share in shares) > ctx.kv_heads
        if copied:  # places overlap, so each copy's gradient comes to one of its own
            places = [(q, torch.empty_like(k), torch.empty_like(v)) for q, k, v in places]
        start_all_to_all(_by_rank(gradients, axis), places, axis).wait()
        if copied:
            dk, dv = (_sum_copies([place[index] for place in places], shares, dk) for index in (1, 2))
        return dq, dk, dv, None


def _heads_of(share: HeadShare, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Views of a rank's heads of [S, B, all heads, H]."""
    return q[:, :, share.q0 : share.q1], k[:, :, share.k0 : share.k1], v[:, :, share.k0 : share.k1]


def _by_rank(tensors: Sequence[Tensor], axis: Axis) -> list[tuple[Tensor, ...]]:
    """Views of every rank's positions of [U S, ...]."""
    return list(zip(*(x.chunk(axis.size) for x in tensors), strict=True))


def _sum_copies(parts: list[Tensor], shares: Sequence[HeadShare], like: Tensor) -> Tensor:
    """The gradient of all kv heads from those of every rank's copies, summed in fp32 or wider."""
    total = like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
    for share, part in zip(shares, parts, strict=True):
        total[:, :, share.k0 : share.k1] += part
    return total.to(like.dtype)


def _gather_heads(x: Tensor, axis: Axis, heads: list[int]) -> Tensor:
    """[U S, B, this rank's heads, H] -> [S, B, all heads, H]; `heads` counts those of every rank."""
    out = x.new_empty(x.shape[0] // axis.size, x.shape[1], sum(heads), x.shape[3])
    start_all_to_all(_by_rank([x], axis), [(part,) for part in out.split(heads, 2)], axis).wait()
    return out


def _scatter_heads(x: Tensor, axis: Axis, heads: list[int]) -> Tensor:
    """The inverse of `_gather_heads`."""
    out = x.new_empty(axis.size * x.shape[0], x.shape[1], heads[axis.rank], x.shape[3])
    start_all_to_all([(part,) for part in x.split(heads, 2)], _by_rank([out], axis), axis).wait()
    return out


class _HeadsToSequence(torch.autograd.Function):
    """[U S, B, this rank's heads, H] -> [S, B, N, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, heads: list[int]) -> Tensor:
        ctx.axis, ctx.heads = axis, heads
        return _gather_heads(x, axis, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_heads(grad, ctx.axis, ctx.heads), None, None


class UlyssesAttention(nn.Module):
    """Wraps any attention over a whole sequence, or over a ring's shard of it, so that it runs split over `axis`, too.

    Args:
        attention: function (q, k, v, **options) -> (out, anything) such as `attend`.
        axis: the Ulysses axis, of U ranks; at most the query heads N of this rank.

    Forward: q [S, B, N, H], k and v [S, B, G, H], this rank's S positions in rank order -> [S, B, N, H].

    Example:
        UlyssesAttention(attend, state.ulysses)(q, k, v)
    """

    def __init__(self, attention: LocalAttention, axis: Axis) -> None:
        super().__init__()
        self.attention, self.axis = attention, axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.axis.size == 1:
            return self.attention(q, k, v, **options)[0]
        shares = head_shares(q.shape[2], k.shape[2], self.axis.size)
        mine = shares[self.axis.rank]
        dropout = options.get("dropout")
        if dropout is not None:
            options["dropout"] = dropout.for_heads(mine.q0)
        of_each = mine.kv_of_queries(q.shape[2] // k.shape[2])
        heads = [share.q1 - share.q0 for share in shares]
        q, k, v = _SequenceToHeads.apply(q, k, v, self.axis)
        if of_each is not None:
            k, v = k[:, :, of_each], v[:, :, of_each]
        return _HeadsToSequence.apply(self.attention(q, k, v, **options)[0], self.axis, heads)
