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

from collections.abc import Callable
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
        ctx.axis, ctx.shares, ctx.kv_shape = axis, shares, k.shape
        per_head = q.shape[0] * q.shape[1] * q.shape[3]
        sizes = [sum(share.sizes) * per_head for share in shares]
        send = q.new_empty(sum(sizes))
        for share, part in zip(shares, send.split(sizes), strict=True):
            views = part.view(*q.shape[:2], -1, q.shape[3]).split(share.sizes, 2)
            for view, x in zip(views, (q[:, :, share.q0 : share.q1], k, v), strict=True):
                view.copy_(x if x.shape[2] == view.shape[2] else x[:, :, share.k0 : share.k1])
        mine = shares[axis.rank]
        received = start_all_to_all(send, axis, (sizes, [sizes[axis.rank]] * axis.size)).wait()
        return received.view(-1, q.shape[1], sum(mine.sizes), q.shape[3]).split(mine.sizes, 2)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        axis, shares, (length, batch, kv_heads, head_dim) = ctx.axis, ctx.shares, ctx.kv_shape
        sizes = [sum(share.sizes) * length * batch * head_dim for share in shares]
        send = torch.cat((dq, dk, dv), 2).flatten()
        received = start_all_to_all(send, axis, ([sizes[axis.rank]] * axis.size, sizes)).wait()
        copied = sum(share.k1 - share.k0 for share in shares) > kv_heads
        wide = torch.promote_types(dq.dtype, torch.float32) if copied else dq.dtype
        grad_q = dq.new_empty(length, batch, shares[-1].q1, head_dim)
        grad_k, grad_v = (dq.new_zeros(ctx.kv_shape, dtype=wide) for _ in range(2))
        for share, part in zip(shares, received.split(sizes), strict=True):
            q, k, v = part.view(length, batch, -1, head_dim).split(share.sizes, 2)
            grad_q[:, :, share.q0 : share.q1] = q
            grad_k[:, :, share.k0 : share.k1] += k
            grad_v[:, :, share.k0 : share.k1] += v
        return grad_q, grad_k.to(dk.dtype), grad_v.to(dv.dtype), None


def _gather_heads(x: Tensor, axis: Axis, heads: list[int]) -> Tensor:
    """[U S, B, this rank's heads, H] -> [S, B, all heads, H]; `heads` counts those of every rank."""
    length, per_head = x.shape[0] // axis.size, x.shape[1] * x.shape[3] * (x.shape[0] // axis.size)
    sizes = [count * per_head for count in heads]
    received = start_all_to_all(x.flatten(), axis, ([sizes[axis.rank]] * axis.size, sizes)).wait()
    return torch.cat([part.view(length, x.shape[1], -1, x.shape[3]) for part in received.split(sizes)], 2)


def _scatter_heads(x: Tensor, axis: Axis, heads: list[int]) -> Tensor:
    """The inverse of `_gather_heads`."""
    send = torch.cat([part.flatten() for part in x.split(heads, 2)])
    sizes = [count * x.shape[0] * x.shape[1] * x.shape[3] for count in heads]
    received = start_all_to_all(send, axis, (sizes, [sizes[axis.rank]] * axis.size)).wait()
    return received.view(-1, x.shape[1], heads[axis.rank], x.shape[3])


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
