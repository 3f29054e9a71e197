"""Fake tensors that stand for those of a GPU, and what stands in for code that cannot run on them."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from megasp import collectives
from megasp.data_parallel.weight_shards import AllGather, ReduceScatter, Transport
from megasp.dry_run.shape_cache import ShapeCache, of
from megasp.dry_run.tracker import Tracker
from megasp.host_copies import PlainCopier
from megasp.model import compiled, fp8, init, loss, matmul
from megasp.parallel_state import Axis, Traffic
from megasp.parameters import Piece
from megasp.sequence_parallel.block_kernels import CPUFlash, Options, sum_groups
from megasp.sequence_parallel.blocks import Block
from megasp.sequence_parallel.parcels import Partial


class RepeatedKV(CPUFlash):
    """What cuDNN's attention takes beside: keys, values and their gradients for every query head."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return super()._forward(q, k, v, causal, scale)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        dq, dk, dv = super()._backward(dout, q, k, v, out, lse, causal, scale)
        return dq, sum_groups(dk, groups), sum_groups(dv, groups)


@contextmanager
def _copies(tracker: Tracker) -> Iterator[None]:
    """Copies between the device's memory and the host's, which are one for PyTorch here."""
    clone, to = PlainCopier.to_host, Tensor.to

    def to_host(copies: PlainCopier, x: Tensor) -> Any:
        with tracker.placed(on_host=True):
            return clone(copies, x)

    def to_device(copies: PlainCopier, x: Tensor) -> Any:
        with tracker.placed(on_host=False):
            return clone(copies, x)

    def is_host(copies: PlainCopier, x: Tensor) -> bool:
        return tracker.of_host(x)

    def to_the_other(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """fully_shard asks for the host, or for the device, where it brings a shard or a gradient to the other."""
        by_fsdp = sys._getframe(1).f_globals["__name__"].startswith("torch.distributed.fsdp")
        if not by_fsdp or not isinstance(args[0], torch.device):
            return to(x, *args, **kwargs)
        with tracker.placed(on_host=not tracker.of_host(x)):
            return x.clone()

    with (
        mock.patch.multiple(PlainCopier, to_host=to_host, to_device=to_device, is_host=is_host),
        mock.patch.object(Tensor, "to", to_the_other),
    ):
        yield


@contextmanager
def _blocks_once(tracker: Tracker) -> Iterator[None]:
    """Blocks of attention, of which chunks of a sequence have thousands alike: what one takes is counted once."""
    attend = sys.modules["megasp.sequence_parallel.attend"]  # the package has a function of this name

    def once(function: Callable[..., None]) -> Callable[..., None]:
        def run(held: Any, keys: Any, sums: Any, block: Block, job: Any, options: Options, *heads: slice) -> None:
            if options.dropout is not None:
                return function(held, keys, sums, block, job, options, *heads)
            summed = (sums.out, sums.lse) if isinstance(sums, Partial) else sums
            part = [(each.start, each.stop) for each in heads]
            key = function, job.kernel, block.row, block.q, block.k, block.kind, of((held, keys, summed, part))
            tracker.once(key, lambda: function(held, keys, sums, block, job, options, *heads))

        return run

    forward, backward = (once(getattr(attend, name)) for name in ("_forward_block", "_backward_block"))
    with mock.patch.multiple(attend, _forward_block=forward, _backward_block=backward):
        yield


@contextmanager
def _loss_once(tracker: Tracker) -> Iterator[None]:
    """Chunks of the loss, of which long sequences have thousands alike: what one takes and sends is counted once."""
    function, sent = loss._add_chunk, dict[Any, Traffic]()

    def add_chunk(total: Tensor, dhidden: Any, dweight: Any, data: Any, weight: Tensor, axis: Axis, *rest: Any) -> Any:
        if dweight is None:  # which is made here
            return function(total, dhidden, dweight, data, weight, axis, *rest)
        key = function, of((dhidden, dweight, data, weight)), axis.name, *rest
        apart = replace(axis, traffic=Traffic())
        tracker.once(key, lambda: bool(function(total, dhidden, dweight, data, weight, apart, *rest) is dweight))
        if apart.traffic.calls:
            sent[key] = apart.traffic
        axis.traffic.add_all(sent.get(key, apart.traffic))
        return dweight

    with mock.patch.object(loss, "_add_chunk", add_chunk):
        yield


@contextmanager
def fake_tensors() -> Iterator[Tracker]:
    """Fake tensors inside, which stand for those of a GPU (the loss passes over a chunk's logits at once there,
    products of lower precision are written in fp32 as they are, and nothing is compiled), and the tracker that counts
    them."""

    def no_values(piece: Piece, seed: int) -> Tensor:
        return torch.empty(0).expand(piece.box.size) if 0 in piece.box.size else torch.empty(()).expand(piece.box.size)

    def wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        tracker.flops["matrix products"] += 2 * x.numel() * y.shape[0]
        return x.new_empty((x.shape[0], y.shape[0]), dtype=dtype)

    resize = torch.UntypedStorage.resize_
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = Tracker(ShapeCache(mode).run)

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # which no dispatcher sees
        result = resize(storage, size)
        tracker.note(storage, name="gathered weights")
        return result

    def named(transport: type[Transport], name: str) -> Any:
        def allocate(own: Transport, size: Sequence[int], **kwargs: Any) -> Tensor:
            x = torch.empty(*size, **kwargs)
            tracker.note(x.untyped_storage(), name=name)
            return x

        return mock.patch.object(transport, "allocate", allocate)

    from_group = DeviceMesh.from_group

    def real_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:  # a mesh reads the ranks out of its tensor
        with unset_fake_temporarily():
            return from_group(*args, **kwargs)

    def no_product(a: Tensor, b: Tensor, *_: Any, bias: Tensor | None, output_dtype: torch.dtype) -> Tensor:
        tracker.flops["matrix products"] += 2 * a.numel() * b.shape[1]
        return a.new_empty((a.shape[0], b.shape[1]), dtype=output_dtype)

    gc.collect()
    with (
        _copies(tracker),
        _blocks_once(tracker),
        _loss_once(tracker),
        mock.patch.object(DeviceMesh, "from_group", real_mesh),
        mock.patch.object(init, "initial_values", no_values),
        mock.patch.object(loss, "CACHE_BYTES", 1 << 62),
        mock.patch.multiple(compiled, COMPILER=tracker.one_kernel, check=lambda *_: None),
        mock.patch.dict(fp8.KERNELS, cpu=fp8.scaled_mm),
        mock.patch.object(torch.nn.functional, "scaled_mm", no_product),  # it need not know fake tensors
        mock.patch.object(matmul, "wide_product", wide_product),
        mock.patch.object(collectives, "_post", lambda *_: []),  # messages to every rank, one by one
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        named(AllGather, "gathered weights"),
        named(ReduceScatter, "reduction buffers"),
        mode,
        tracker,
    ):
        yield tracker
