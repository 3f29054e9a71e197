"""Runs the real build and the real training step of one rank of any layout on fake tensors, and counts every byte.

No memory is taken and nothing is computed: tensors have shapes alone (PyTorch's FakeTensorMode), and process groups are
PyTorch's fake ones. What would be allocated is followed storage by storage, so the peak is exact, but for what kernels
take inside themselves and for the allocator's rounding. The account of `megasp memory` is checked by it.
"""

import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megasp import parallel_state
from megasp.config.kernels import KernelConfig, choose_kernel
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data import Batch
from megasp.data_parallel import Replicas, global_norm, sum_partial_, sum_tied_
from megasp.data_parallel.weight_shards import AllGather, ReduceScatter, Transport
from megasp.footprint import pinned
from megasp.host_copies import PlainCopier
from megasp.model import fp8, init, loss, matmul, norm_kernels
from megasp.parameters import Piece
from megasp.training import communication
from megasp.training.build import Training, build
from megasp.training.volumes import Volume, closed_forms


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak.

    Attributes:
        live, peak: bytes of the device now, and at most since `peak` was set.
        host, host_peak: the same of what would be in the host's memory.
        flops: kind -> floating-point operations since it was cleared.
        parts: who holds what at the last peak that was at least `expected`, of tensors `held` by somebody that knows,
            or named when they were allocated; the rest by the pipeline's `action` that allocated it: this one or one
            before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = self.host_peak = 0
        self.flops: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._of_host: set[int] = set()
        self._hosting = False
        self._names: dict[int, str | int] = {}
        self.action, self.expected, self.whole = 0, float("inf"), ""
        self.held: Callable[[], Iterator[tuple[str, Tensor]]] = lambda: iter(())
        self.parts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # it unwraps itself, and what it does with the local tensors comes back here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter((out, args)):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.flops["matrix products"] += _product_flops(name, args, out)
        elif "scaled_dot_product" in name:
            self.flops["attention"] += _attention_flops(name, args)
        return out

    def note(self, storage: torch.UntypedStorage, name: str = "") -> None:
        """Count a storage that is new, or has another size than when it was seen last."""
        key, size = storage._cdata, pinned(storage.nbytes()) if self._hosting else storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._names[key] = self.action
            if self._hosting:
                self._of_host.add(key)
        self._names[key] = name or self._names[key]
        if size == self._sizes.get(key) or (key in self._sizes and key in self._of_host):
            return
        self._add(key, size - self._sizes.get(key, 0))
        self._sizes[key] = size
        if self.live > self.peak:
            self.peak = self.live
            if self.peak >= self.expected:
                self.parts = self._by_holder()

    def _by_holder(self) -> Counter[str]:
        """Bytes of the device by component."""
        names = self._names | {x.untyped_storage()._cdata: name for name, x in self.held()}
        parts: Counter[str] = Counter()
        for key, size in self._sizes.items():
            name = names[key]
            if isinstance(name, int):
                name = "working memory" if name == self.action else "kept activations"
            parts[name] += 0 if key in self._of_host else size
        return parts

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is allocated inside would be in the host's memory."""
        self._hosting = True
        yield
        self._hosting = False

    def move_to_host(self, x: Tensor) -> None:
        """A tensor that is the host's from now on."""
        key = x.untyped_storage()._cdata
        self._add(key, -self._sizes[key])
        self._of_host.add(key)
        self._add(key, self._sizes[key])

    def of_host(self, x: Tensor) -> bool:
        """Whether a tensor is the host's."""
        return x.untyped_storage()._cdata in self._of_host

    def _add(self, key: int, size: int) -> None:
        if key in self._of_host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.live += size

    def _forget(self, key: int) -> None:
        self._add(key, -self._sizes.pop(key))
        del self._names[key]
        self._of_host.discard(key)


NEARLY = 0.99
"""Of the step before's peak: from there on it is looked at who holds what."""

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_linear_pointwise": 0}
"""Operators of matrix products, and the place of their first factor."""


def _product_flops(name: str, args: Sequence[Any], out: Any) -> int:
    return 2 * out.numel() * args[PRODUCTS[name]].shape[-1]


def _attention_flops(name: str, args: Sequence[Any]) -> int:
    """Of PyTorch's fused attention on a CPU, whose last argument says whether it is causal, and is counted half then:
    two products forward, five backward."""
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    return (5 if backward else 2) * 2 * query.numel() * key.shape[-2] // (2 if args[-1] is True else 1)


@dataclass(frozen=True)
class Count:
    """Of one rank.

    Attributes:
        built, passes, optimizer: bytes after the build, and the peaks of a step's passes and of its optimizer.
        volume: what the step sent, and computed.
        formula: the same in closed form.
        host: bytes that the host holds between steps; `host_passes`: the peak of a step's passes there.
        parts: component -> bytes at the peak, with two steps or more; messages between stages are among activations.
    """

    built: int
    passes: int
    optimizer: int
    volume: Volume
    formula: Volume
    host: int = 0
    host_passes: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.passes, self.optimizer)


def count(config: Config, layout: Layout, rank: int = 0, steps: int = 2) -> Count:
    """What one rank of the layout holds, in bytes, in the last of some steps.

    Args:
        config: validated for this layout.
    """
    fused_norms = config.kernels.norm("cuda", config.training.compute_dtype)[0] != "unfused"
    config = _kernel_of_a_gpu(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        state = parallel_state.build(layout, torch.device("cpu"))
        with fake_tensors(fused_norms) as tracker:
            training = build(config, state)
            for master, weight in zip(training.optimizer.masters, training.replicas.masters, strict=True):
                for tensor in (master, *training.optimizer.state[master].values()) if master is not weight else ():
                    tracker.move_to_host(tensor)
            built = tracker.live
            batches = [_batch(training) for _ in range(config.num_microbatches(layout))]
            _watch(tracker, training)
            passes = optimizer = 0
            for _ in range(steps):
                tracker.expected = max(passes, optimizer) * NEARLY or tracker.expected
                tracker.peak, tracker.host_peak = 0, tracker.host
                tracker.flops.clear()
                communication.reset(training)
                training.pipeline.train(batches, 1.0)
                training.replicas.finish()
                passes, tracker.peak, host_passes = tracker.peak, 0, tracker.host_peak
                sum_partial_(training.replicas.masters, state.tp)
                sum_tied_(training.tied, state.ends)
                global_norm(training.replicas.masters, state.model)
                training.optimizer.step()
                training.replicas.publish()
                optimizer = tracker.peak
            volume, formula = Volume(_sent(training), tracker.flops), closed_forms(training, batches)
            parts = {name: size for name, size in tracker.parts.items() if size}
            return Count(built, passes, optimizer, volume, formula, tracker.host, host_passes, parts)
    finally:
        dist.destroy_process_group()


def _watch(tracker: Tracker, training: Training) -> None:
    """Tell the tracker who holds what, and when an action begins."""
    zero, replicas, optimizer = training.state.layout.zero, training.replicas, training.optimizer

    def held() -> Iterator[tuple[str, Tensor]]:
        yield from (("gradients", x) for x in replicas.gradients())
        yield from (("optimizer states", x) for kept in optimizer.state.values() for x in kept.values())
        yield from (("master weights", x) for x in optimizer.masters)
        own = replicas.parameters if isinstance(replicas, Replicas) else ()
        yield from (("parameters", x) for x in own)

    def begin(event: str, action: object) -> None:
        tracker.action += event == "start"

    tracker.held, tracker.whole = held, "gathered weights" if zero == 3 else "parameters"
    training.pipeline.watch = begin


def _sent(training: Training) -> Counter[tuple[str, str]]:
    return Counter(
        {
            (name, operation): size
            for name, axis in training.state.axes.items()
            for operation, size in axis.traffic.bytes_sent.items()
        }
    )


def _kernel_of_a_gpu(config: Config) -> Config:
    """The same run with the CPU's kernel that holds as much as a GPU's would: scores with both, or with neither; and
    with weight gradients in a GPU's dtype."""
    training, model = config.training, config.model
    dtype = training.compute_dtype
    name, _ = choose_kernel(training.attention_backend, "cuda", dtype, model.attention_dropout, model.head_dim)
    backend = "unfused" if name == "unfused" else "auto"
    made = "fp32" if training.widens_gradients("cuda") else "compute"
    training = dataclasses.replace(training, attention_backend=backend, weight_gradient_dtype=made)
    return dataclasses.replace(config, training=training, kernels=KernelConfig())


class _FusedNorms:
    """What one kernel allocates: PyTorch's fused norms run as several operations on a CPU."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), _statistic(x)

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), _statistic(x), _statistic(x)

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@contextmanager
def fake_tensors(fused_norms: bool = True) -> Iterator[Tracker]:
    """Fake tensors inside, which stand for those of a GPU (the loss passes over a chunk's logits at once there,
    products of lower precision are written in fp32 as they are, and norms may be one kernel), and the tracker that
    counts them."""

    def no_values(piece: Piece, seed: int) -> Tensor:
        return torch.empty(0).expand(piece.box.size) if 0 in piece.box.size else torch.empty(()).expand(piece.box.size)

    def wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        tracker.flops["matrix products"] += 2 * x.numel() * y.shape[0]
        return x.new_empty((x.shape[0], y.shape[0]), dtype=dtype)

    resize = torch.UntypedStorage.resize_
    tracker = Tracker()

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # which no dispatcher sees
        result = resize(storage, size)
        tracker.note(storage, tracker.whole)
        return result

    def allocate(name: str, transport: type[Transport]) -> Any:
        def allocated(own: Transport, size: Any, **kwargs: Any) -> Tensor:
            x = torch.empty(*size, **kwargs)
            tracker.note(x.untyped_storage(), name)
            return x

        return mock.patch.object(transport, "allocate", allocated)

    from_group = DeviceMesh.from_group

    def real_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:  # a mesh reads the ranks out of its tensor
        with unset_fake_temporarily():
            return from_group(*args, **kwargs)

    to_host = PlainCopier.to_host

    def copy_out(copies: PlainCopier, x: Tensor) -> Any:
        with tracker.on_host():
            return to_host(copies, x)

    def is_host(copies: PlainCopier, x: Tensor) -> bool:
        return tracker.of_host(x)

    def no_product(a: Tensor, b: Tensor, *_: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        tracker.flops["matrix products"] += 2 * a.numel() * b.shape[1]
        return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)

    gc.collect()
    with (
        mock.patch.multiple(PlainCopier, to_host=copy_out, is_host=is_host),
        mock.patch.object(DeviceMesh, "from_group", real_mesh),
        mock.patch.object(init, "initial_values", no_values),
        mock.patch.object(loss, "CACHE_BYTES", 1 << 62),
        mock.patch.dict(norm_kernels.NORMS, unfused=_FusedNorms() if fused_norms else norm_kernels.UNFUSED),
        mock.patch.dict(fp8.KERNELS, cpu=fp8.scaled_mm),
        mock.patch.object(torch, "_scaled_mm", no_product),  # which has no form for fake tensors of a CPU
        mock.patch.object(matmul, "wide_product", wide_product),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        allocate("gathered weights", AllGather),
        allocate("reduction buffers", ReduceScatter),
        FakeTensorMode(allow_non_fake_inputs=True),
        tracker,
    ):
        yield tracker


def _batch(training: Training) -> Batch:
    """A microbatch of this rank."""
    config, state = training.config, training.state
    shape = config.training.micro_batch_size, config.training.seq_length // state.cp.size
    tokens = np.zeros(shape, np.int64)
    positions = np.arange(shape[1])
    return Batch(tokens, tokens, np.ones(shape, np.float32), positions, np.arange(shape[0]))
