"""Collectives over an `Axis`, and autograd pairs of them: the backward of each is its partner.

    forward                     backward
    copy_to         identity    all-reduce
    reduce_from     all-reduce  identity
    gather_from     all-gather  reduce-scatter
    scatter_to      reduce-scatter  all-gather

Gathers and scatters work on dim 0. Over an axis of one rank everything is the identity and nothing is counted.
Every call adds to `axis.traffic`: what leaves this rank, by the algorithm-free count (all-to-all and reduce-scatter
(w-1)/w of the input, all-gather (w-1) times the input, all-reduce 2 (w-1)/w; a message to one rank its size).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasp.parallel_state import Axis

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective on its way. `wait()` returns the result; work placed before it overlaps the transfer."""

    def __init__(self, result: Tensor, work: Any = None, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self._result, self._work, self._finish = result, work, finish

    def done(self) -> bool:
        """Whether it is known to have ended. (Gloo tells of no send that it is done before one waits for it.)"""
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._finish is not None:
            self._result, self._finish = self._finish(self._result), None
        return self._result


def start_all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """[n, ...] of every rank -> [size * n, ...], stacked in rank order; into `out`, of which `x` may be a part."""
    if axis.size == 1:
        return Pending(x if out is None else out.copy_(x))
    x = x.contiguous()
    axis.traffic.add("all_gather", x.nbytes * (axis.size - 1))
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:])) if out is None else out
    return Pending(out, _all_gather(out, x, group=axis.group, async_op=True))


def start_reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """[size * n, ...] -> this rank's [n, ...] of the sum over ranks; into `out` where it is given.

    On gloo it is an all-to-all and a local sum: three times faster than gloo's own reduce-scatter (an all-reduce and a
    copy), in a fixed rank order, and low precision is summed in fp32.
    """
    if axis.size == 1:
        return Pending(x if out is None else out.copy_(x))
    x = x.contiguous()
    axis.traffic.add("reduce_scatter", x.nbytes * (axis.size - 1) // axis.size)
    rows = x.shape[0] // axis.size
    if dist.get_backend(axis.group) != "gloo":
        out = x.new_empty((rows, *x.shape[1:])) if out is None else out
        return Pending(out, _reduce_scatter(out, x, group=axis.group, async_op=True))
    received = torch.empty_like(x)
    work = dist.all_to_all_single(received, x, group=axis.group, async_op=True)

    def add_up(parts: Tensor) -> Tensor:
        total = parts.view(axis.size, rows, *x.shape[1:]).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return total.to(x.dtype) if out is None else out.copy_(total)

    return Pending(received, work, add_up)


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """The sum over ranks. Works in place on `x`."""
    if axis.size == 1:
        return Pending(x)
    assert x.is_contiguous()
    axis.traffic.add("all_reduce", 2 * x.nbytes * (axis.size - 1) // axis.size)
    return Pending(x, dist.all_reduce(x, group=axis.group, async_op=True))


class PendingExchange:
    """Messages on their way; `wait()` returns when all have been sent and received."""

    def __init__(self, works: list[Any], finish: Callable[[], None] | None = None) -> None:
        self._works, self._finish = works, finish

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._finish is not None:
            self._finish()


def start_exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], axis: Axis) -> PendingExchange:
    """Messages between single ranks of the axis: (contiguous tensor, rank on the axis) each.

    Two ranks must list what passes between them in the same order. Where there is nothing, no call is made.
    """
    for tensor, _ in sends:
        axis.traffic.add("send", tensor.nbytes)
    return PendingExchange(_post(sends, receives, axis))


def start_all_to_all(
    sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]], axis: Axis
) -> PendingExchange:
    """Every rank's sends[r] go to rank r, into its receives[this rank]: tensors of the same shapes, of any strides.

    All of it is one exchange, as an all-to-all is. Nothing is packed that is contiguous, and what stays on this rank is
    copied straight from place to place while the rest travels.
    """
    others = [(axis.rank + distance) % axis.size for distance in range(1, axis.size)]
    axis.traffic.add("all_to_all", sum(x.nbytes for rank in others for x in sends[rank]))
    outgoing = [(x.contiguous(), rank) for rank in others for x in sends[rank]]
    incoming = [(x, x if x.is_contiguous() else x.new_empty(x.shape), rank) for rank in others for x in receives[rank]]
    works = _post(outgoing, [(buffer, rank) for _, buffer, rank in incoming], axis)
    for mine, place in zip(sends[axis.rank], receives[axis.rank], strict=True):
        place.copy_(mine)

    def unpack() -> None:
        outgoing.clear()  # held until here, as they may be copies
        for place, buffer, _ in incoming:
            if buffer is not place:
                place.copy_(buffer)

    return PendingExchange(works, unpack)


def _post(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], axis: Axis) -> list[Any]:
    # A rank that only receives must not post before one that only sends: one batch, both directions (NCCL's rule).
    operations = [dist.P2POp(dist.isend, tensor, group=axis.group, group_peer=peer) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, group=axis.group, group_peer=peer) for tensor, peer in receives]
    return dist.batch_isend_irecv(operations) if operations else []


def start_send(x: Tensor, link: Axis) -> Pending:
    """To the other rank of a link of two. `x` must stay as it is until the send is done."""
    x = x.contiguous()
    link.traffic.add("send", x.nbytes)
    return Pending(x, dist.isend(x, group=link.group, group_dst=1 - link.rank))


def start_receive(buffer: Tensor, link: Axis) -> Pending:
    """From the other rank of a link of two, into `buffer`. Messages of a link come in the order of sending."""
    return Pending(buffer, dist.irecv(buffer, group=link.group, group_src=1 - link.rank))


def all_reduce_(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over the axis in place, and return it."""
    if axis.size > 1:
        axis.traffic.add("all_reduce", 2 * x.nbytes * (axis.size - 1) // axis.size)
        dist.all_reduce(x, op, group=axis.group)
    return x


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grad.contiguous().clone(), ctx.axis).wait(), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return start_all_reduce(x.contiguous().clone(), axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_all_gather(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grad, ctx.axis).wait(), None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_reduce_scatter(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_gather(grad, ctx.axis).wait(), None


def _pair(function: type[torch.autograd.Function], x: Tensor, axis: Axis) -> Tensor:
    return x if axis.size == 1 else function.apply(x, axis)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Identity; its gradient is summed over the axis (Megatron-LM's f, arXiv 1909.08053 section 3)."""
    return _pair(_CopyTo, x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; its gradient passes unchanged (Megatron-LM's g)."""
    return _pair(_ReduceFrom, x, axis)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] -> [size * n, ...]; its gradient is summed and scattered (arXiv 2205.05198 section 4.2)."""
    return _pair(_GatherFrom, x, axis)


def scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """[size * n, ...] -> [n, ...] of the sum over the axis; its gradient is gathered."""
    return _pair(_ScatterTo, x, axis)
