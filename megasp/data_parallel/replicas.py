"""Replicated weights (ZeRO-0): fp32 master weights, fp32 accumulation over microbatches, one reduction per step.

Gradients gather in flat buckets, one after another in the order in which the backward makes them. In the last
microbatch's backward a bucket is all-reduced as soon as its last gradient is there, while earlier layers still compute:

    backward    layer 3 | layer 2 | layer 1 | layer 0
    all-reduce            bucket 0 ~~~~~~~ bucket 1 ~~~~~~~

Where nothing is to be reduced and the compute dtype is the master's, there is no bucket: gradients stay where autograd
puts them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megasp.collectives import Pending, start_all_reduce
from megasp.parallel_state import Axis

BUCKET_ELEMENTS = 16 * 2**20
"""Elements after which a bucket is closed: 64 MiB of fp32."""


class Replicas:
    """The training state of a model that every rank of `axis` holds whole.

    `masters` are the parameters that the optimizer steps: the model's own, or fp32 copies of lower-precision ones. Each
    carries its `pieces`, and after `finish` its gradient, fp32 or wider. Where the optimizer has masters of its own on
    the host they are the model's own in any case, and it leaves the new values there.

        for i, batch in enumerate(microbatches):
            replicas.begin_microbatch(last=i == len(microbatches) - 1)
            loss(batch).backward()
        replicas.finish()
        optimizer.step()
        replicas.publish()

    Args:
        model: its parameters all have the compute dtype.
        axis: the ranks over which gradients are summed.
        gradient_dtype: of accumulation and reduction; fp32 or wider without it.
        widen: gradients of a microbatch are made in it, too, and not in the compute dtype.
        host_share: share of the parameters whose masters are on the host, as `on_host` chooses them.

    Attributes:
        shard_axis: the ranks that share out what a rank holds of the model: this one alone.
        owner: whether this rank writes what it holds to a checkpoint; the others hold the same.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        gradient_dtype: torch.dtype | None = None,
        widen: bool = False,
        host_share: float = 0.0,
    ) -> None:
        self.axis, self.gradient_dtype, self.widen = axis, gradient_dtype, widen
        self.shard_axis, self.owner = Axis("dp_cp"), axis.rank == 0
        self.parameters = list(model.parameters())
        away = on_host(self.parameters, host_share)
        self.masters = [
            _own(parameter) if there else _master(parameter)
            for parameter, there in zip(self.parameters, away, strict=True)
        ]
        self._buckets: list[_Bucket] = []
        if axis.size > 1 or any(p.dtype != master_dtype(p.dtype) for p in self.parameters):
            self._make_buckets()

    @property
    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.masters, self.parameters, strict=True))

    def _make_buckets(self) -> None:
        bucket: list[tuple[nn.Parameter, nn.Parameter]] = []
        elements = 0
        pairs = self._pairs[::-1]  # the backward reaches the last layers first
        for pair in pairs:
            bucket.append(pair)
            elements += pair[0].numel()
            if elements >= BUCKET_ELEMENTS or pair is pairs[-1]:
                self._buckets.append(_Bucket(bucket, self.axis, self.gradient_dtype, self.widen))
                bucket, elements = [], 0

    def begin_microbatch(self, last: bool) -> None:
        """Before each forward and backward: whether this backward is the step's last, whose gradients are reduced."""
        for bucket in self._buckets:
            bucket.reduce_when_full = last

    def finish(self) -> None:
        """After the last backward: wait until every master's `grad` holds the sum over the axis."""
        for bucket in self._buckets:
            bucket.finish()

    def gradients(self) -> Iterator[Tensor]:
        """All that is there of gradients now, with their buffers."""
        yield from (bucket.buffer for bucket in self._buckets)
        yield from (x.grad for x in (*self.parameters, *self.masters) if x.grad is not None)

    def publish(self) -> None:
        """After the optimizer's step: copy masters to the compute weights, and drop the gradients."""
        copies = [(parameter, master) for master, parameter in self._pairs if master is not parameter]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([compute for compute, _ in copies], [master for _, master in copies])
        for master in self.masters:
            master.grad = None


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """fp32, or the compute dtype where that is wider."""
    return torch.promote_types(compute, torch.float32)


def on_host(parameters: Sequence[nn.Parameter], share: float) -> list[bool]:
    """Of which parameters the masters are on the host: the first ones that hold at least `share` of all elements."""
    left = share * sum(p.numel() for p in parameters)
    chosen = []
    for parameter in parameters:
        chosen.append(left > 0)
        left -= parameter.numel()
    return chosen


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, on which a gradient of a wider dtype may be left."""
    parameter.grad_dtype = None  # autograd's own gradients keep the parameter's
    return parameter


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself in fp32 or wider, else an fp32 copy."""
    wide = master_dtype(parameter.dtype)
    if wide == parameter.dtype:
        return parameter
    master = nn.Parameter(parameter.detach().to(wide))
    master.pieces = parameter.pieces  # type: ignore[attr-defined]
    return master


class _Bucket:
    """One flat gradient `buffer`; each parameter's gradient is added to its view as autograd makes it."""

    def __init__(
        self, pairs: list[tuple[nn.Parameter, nn.Parameter]], axis: Axis, dtype: torch.dtype | None, widen: bool
    ) -> None:
        self.axis = axis
        self.pairs = pairs
        self.reduce_when_full = False
        first = pairs[0][0]
        dtype = dtype or master_dtype(first.dtype)
        self.buffer = torch.zeros(sum(m.numel() for m, _ in pairs), dtype=dtype, device=first.device)
        self._views = [
            view.view_as(m)
            for (m, _), view in zip(pairs, self.buffer.split([m.numel() for m, _ in pairs]), strict=True)
        ]
        self._added: set[int] = set()
        self._missing = len(pairs)
        self._pending: Pending | None = None
        for index, (_, parameter) in enumerate(pairs):
            if widen and parameter.dtype != self.buffer.dtype:
                parameter.grad_dtype = self.buffer.dtype
            parameter.register_post_accumulate_grad_hook(lambda p, index=index: self._add(index, p))

    def _add(self, index: int, parameter: Tensor) -> None:
        """Take one parameter's gradient of this microbatch; the first of a step overwrites what the last step left."""
        if parameter.grad is None:
            return  # autograd calls for a weight whose gradient is deferred, too
        if index in self._added:
            self._views[index].add_(parameter.grad)
        else:
            self._views[index].copy_(parameter.grad)
            self._added.add(index)
        parameter.grad = None
        if self.reduce_when_full:
            self._missing -= 1
            if self._missing == 0:
                self._pending = start_all_reduce(self.buffer, self.axis)

    def finish(self) -> None:
        assert self._pending is not None, "a parameter of this bucket got no gradient"
        self._pending.wait()
        self._pending, self._missing = None, len(self.pairs)
        self._added.clear()
        for (master, _), view in zip(self.pairs, self._views, strict=True):
            master.grad = view.to(master_dtype(master.dtype))
