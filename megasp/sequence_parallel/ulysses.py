"""DeepSpeed-Ulysses (arXiv 2309.14509): attention over a split sequence by exchanging it for a split of the heads.

    before            all-to-all           attention             all-to-all          after
    rank 0  s0 | all heads     ->   all of s | heads 0..N/U   ->   s0 | all heads
    rank 1  s1 | all heads     ->   all of s | heads N/U..    ->   s1 | all heads

q, k and v travel in one exchange and the output in another, so a layer makes two all-to-alls forward and two backward.
kv heads fewer than ranks are sent to every rank whose query heads need them, and their gradients summed on return.
Sent per rank and direction, f = (U - 1) / U, c local tokens, r copies of each kv head: f c b (2 dq + 2 r dkv) elements.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megasp.collectives import start_all_to_all
from megasp.parallel_state import Axis

LocalAttention = Callable[..., tuple[Tensor, Any]]


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """[S, B, heads, H] -> [U, S, B, heads / U, H], a view."""
    return x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)


class _SequenceToHeads(torch.autograd.Function):
    """q [S, B, N, H], k and v [S, B, G, H] -> q [U S, B, N / U, H], k and v [U S, B, max(G / U, 1), H]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> tuple[Tensor, ...]:
        ranks, copies = axis.size, max(1, axis.size // k.shape[2])
        ctx.axis, ctx.copies = axis, copies
        parts = [q, *(x.repeat_interleave(copies, 2) if copies > 1 else x for x in (k, v))]
        send = torch.cat([_by_rank(x, ranks) for x in parts], 3)  # [U, S, B, heads of a rank, H]
        received = start_all_to_all(send.flatten(0, 1), axis).wait()  # [U S, B, heads of a rank, H]
        return received.split([x.shape[2] // ranks for x in parts], 2)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        received = start_all_to_all(torch.cat((dq, dk, dv), 2), ctx.axis).wait()  # [U S, B, heads of a rank, H]
        by_rank = received.unflatten(0, (ctx.axis.size, -1)).permute(1, 2, 0, 3, 4)  # [S, B, U, heads, H]
        dq, dk, dv = (x.flatten(2, 3) for x in by_rank.split([dq.shape[2], dk.shape[2], dv.shape[2]], 3))
        if ctx.copies > 1:
            dk, dv = (x.unflatten(2, (-1, ctx.copies)).sum(3) for x in (dk, dv))
        return dq, dk, dv, None


class _HeadsToSequence(torch.autograd.Function):
    """[U S, B, N / U, H] -> [S, B, N, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        received = start_all_to_all(x, axis).wait()
        return received.unflatten(0, (axis.size, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_to_all(_by_rank(grad, ctx.axis.size).flatten(0, 1), ctx.axis).wait(), None


class UlyssesAttention(nn.Module):
    """Wraps any attention over a whole sequence so that it runs on a sequence split over `axis`.

    Args:
        attention: function (q, k, v, **options) -> (out, anything) such as `kernels.attend`.
        axis: the Ulysses axis, of U ranks. U divides the query heads N of this rank; it divides the kv heads G or is
            a multiple of them.

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
        dropout = options.get("dropout")
        if dropout is not None:
            options["dropout"] = dropout.for_heads(self.axis.rank * q.shape[2] // self.axis.size)
        out, _ = self.attention(*_SequenceToHeads.apply(q, k, v, self.axis), **options)
        return _HeadsToSequence.apply(out, self.axis)
