"""Runs the real build and the real training step of one rank of any layout on fake tensors, and counts every byte.

No memory is taken and nothing is computed: tensors have shapes alone (PyTorch's FakeTensorMode), and process groups are
PyTorch's fake ones. What would be allocated is followed storage by storage, so the peak is exact, but for what kernels
take inside themselves and for the allocator's rounding. The account of `megasp memory` is checked by it.
"""

import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from megasp.data_parallel import global_norm, sum_partial_, sum_tied_
from megasp.host_copies import PlainCopier
from megasp.model import compiled, fp8, init, loss, matmul
from megasp.model.elementwise import Body
from megasp.parameters import Piece
from megasp.sequence_parallel.block_kernels import CPUFlash, sum_groups
from megasp.sequence_parallel.kernels import KERNELS
from megasp.training import communication
from megasp.training.build import Training, build
from megasp.training.volumes import Volume, closed_forms


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak.

    Attributes:
        live, peak: bytes of the device now, and at most since `peak` was set.
        host, host_peak: the same of what would be in the host's memory.
        flops: kind -> floating-point operations since it was cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = self.host_peak = 0
        self.flops: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._of_host: set[int] = set()
        self._hosting = self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # it unwraps itself, and what it does with the local tensors comes back here
        out = func(*args, **(kwargs or {}))
        if self._inside:
            return out
        for tensor in tree_iter((out, args)):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.flops["matrix products"] += _product_flops(name, args, out)
        elif "scaled_dot_product" in name:
            self.flops["attention"] += _attention_flops(name, args)
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, or has another size than when it was seen last."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            if self._hosting:
                self._of_host.add(key)
        self._add(key, size - self._sizes.get(key, 0))
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is allocated inside would be in the host's memory."""
        self._hosting = True
        yield
        self._hosting = False

    def one_kernel(self, body: Body, *tensors: Tensor, **constants: float) -> Any:
        """Runs a body of which nothing is counted but what it returns."""
        self._inside = True
        out = body.eager(*tensors, **constants)
        self._inside = False
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

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
        self._of_host.discard(key)


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
    """

    built: int
    passes: int
    optimizer: int
    volume: Volume
    formula: Volume
    host: int = 0
    host_passes: int = 0

    @property
    def peak(self) -> int:
        return max(self.passes, self.optimizer)


def count(config: Config, layout: Layout, rank: int = 0, steps: int = 2) -> Count:
    """What one rank of the layout holds, in bytes, in the last of some steps.

    Args:
        config: validated for this layout.
    """
    attention: dict[tuple[str, str], Any] = {("flash", "cpu"): _RepeatedKV()} if _gpu_kernel(config) == "fused" else {}
    config = _kernel_of_a_gpu(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        state = parallel_state.build(layout, torch.device("cpu"))
        with mock.patch.dict(KERNELS, attention), fake_tensors() as tracker:
            training = build(config, state)
            for master, weight in zip(training.optimizer.masters, training.replicas.masters, strict=True):
                for tensor in (master, *training.optimizer.state[master].values()) if master is not weight else ():
                    tracker.move_to_host(tensor)
            built = tracker.live
            batches = [_batch(training) for _ in range(config.num_microbatches(layout))]
            for _ in range(steps):
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
            volume, formula = Volume(_sent(training), tracker.flops), closed_forms(training, batches)
            return Count(built, passes, tracker.peak, volume, formula, tracker.host, host_passes)
    finally:
        dist.destroy_process_group()


def _sent(training: Training) -> Counter[tuple[str, str]]:
    return Counter(
        {
            (name, operation): size
            for name, axis in training.state.axes.items()
            for operation, size in axis.traffic.bytes_sent.items()
        }
    )


def _kernel_of_a_gpu(config: Config) -> Config:
    """The same run with the CPU's kernels that hold as much as a GPU's would (scores with both, or with neither; a norm
    by one kernel with both, or with neither), and with weight gradients in a GPU's dtype."""
    training = config.training
    backend = "unfused" if _gpu_kernel(config) == "unfused" else "auto"
    made = "fp32" if training.widens_gradients("cuda") else "compute"
    training = dataclasses.replace(training, attention_backend=backend, weight_gradient_dtype=made)
    norm = "unfused" if config.kernels.norm("cuda", training.compute_dtype)[0] == "unfused" else "compiled"
    kernels = KernelConfig(compile=config.kernels.compile, norm_backend=norm)
    return dataclasses.replace(config, training=training, kernels=kernels)


def _gpu_kernel(config: Config) -> str | None:
    training, model = config.training, config.model
    dropout = model.attention_dropout
    return choose_kernel(training.attention_backend, "cuda", training.compute_dtype, dropout, model.head_dim)[0]


class _RepeatedKV(CPUFlash):
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
    tracker = Tracker()

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # which no dispatcher sees
        result = resize(storage, size)
        tracker.note(storage)
        return result

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

    def no_product(a: Tensor, b: Tensor, *_: Any, bias: Tensor | None, output_dtype: torch.dtype) -> Tensor:
        tracker.flops["matrix products"] += 2 * a.numel() * b.shape[1]
        return a.new_empty((a.shape[0], b.shape[1]), dtype=output_dtype)

    gc.collect()
    with (
        mock.patch.multiple(PlainCopier, to_host=copy_out, is_host=is_host),
        mock.patch.object(DeviceMesh, "from_group", real_mesh),
        mock.patch.object(init, "initial_values", no_values),
        mock.patch.object(loss, "CACHE_BYTES", 1 << 62),
        mock.patch.multiple(compiled, COMPILER=tracker.one_kernel, check=lambda *_: None),
        mock.patch.dict(fp8.KERNELS, cpu=fp8.scaled_mm),
        mock.patch.object(torch.nn.functional, "scaled_mm", no_product),  # it need not know fake tensors
        mock.patch.object(matmul, "wide_product", wide_product),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
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
