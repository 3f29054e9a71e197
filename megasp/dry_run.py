"""Runs the real build and the real training step of one rank of any layout on fake tensors, and counts every byte.

No memory is taken and nothing is computed: tensors have shapes alone (PyTorch's FakeTensorMode), and process groups are
PyTorch's fake ones. What would be allocated is followed storage by storage, so the peak is exact, but for what kernels
take inside themselves and for the allocator's rounding. The account of `megasp memory` is checked by it.
"""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
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
from megasp.config.kernels import choose_kernel
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data import Batch
from megasp.data_parallel import global_norm, sum_partial_, sum_tied_
from megasp.host_copies import PlainCopier
from megasp.model import init, loss, matmul
from megasp.parameters import Piece
from megasp.training.build import Training, build


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak.

    Attributes:
        live, peak: bytes now, and at most since `peak` was set.
        host, host_peak: the same of storages that stand for the host's, whose keys are in `on_host`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = self.host_peak = 0
        self._sizes: dict[int, int] = {}
        self.on_host: set[int] = set()

    def copyon_host(self, x: Tensor) -> Tensor:
        """A copy that is not the device's."""
        copy = x.clone()
        key = copy.untyped_storage()._cdata
        self.live -= self._sizes[key]
        self.host += self._sizes[key]
        self.host_peak = max(self.host_peak, self.host)
        self.on_host.add(key)
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # it unwraps itself, and what it does with the local tensors comes back here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter((out, args)):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, or has another size than when it was seen last."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self.on_host:
            self.on_host.remove(key)
            self.host -= size
        else:
            self.live -= size


@dataclass(frozen=True)
class Count:
    """Bytes of one rank: after the build, the peaks of a step's passes and of its optimizer, and the host's peak."""

    built: int
    passes: int
    optimizer: int
    host: int

    @property
    def peak(self) -> int:
        return max(self.passes, self.optimizer)


def count(config: Config, layout: Layout, rank: int = 0, steps: int = 2) -> Count:
    """What one rank of the layout holds, in bytes, in the last of some steps.

    Args:
        config: validated for this layout.
    """
    config = _kernel_of_a_gpu(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        state = parallel_state.build(layout, torch.device("cpu"))
        with _fake() as tracker:
            training = build(config, state)
            built = tracker.live
            batches = [_batch(training) for _ in range(config.num_microbatches(layout))]
            for _ in range(steps):
                tracker.peak = 0
                training.pipeline.train(batches, 1.0)
                training.replicas.finish()
                passes, tracker.peak = tracker.peak, 0
                sum_partial_(training.replicas.masters, state.tp)
                sum_tied_(training.tied, state.ends)
                global_norm(training.replicas.masters, state.model)
                training.optimizer.step()
                training.replicas.publish()
            return Count(built, passes, tracker.peak, tracker.host_peak)
    finally:
        dist.destroy_process_group()


def _kernel_of_a_gpu(config: Config) -> Config:
    """The same run with the CPU's kernel that holds as much as a GPU's would: scores with both, or with neither; and
    with weight gradients in a GPU's dtype."""
    training, model = config.training, config.model
    dtype = "bfloat16" if training.bf16 else "float32"
    name, _ = choose_kernel(training.attention_backend, "cuda", dtype, model.attention_dropout, model.head_dim)
    backend = "unfused" if name == "unfused" else "auto"
    made = "fp32" if training.widens_gradients("cuda") else "compute"
    training = dataclasses.replace(training, attention_backend=backend, weight_gradient_dtype=made)
    return dataclasses.replace(config, training=training)


@contextmanager
def _fake() -> Iterator[Tracker]:
    """Fake tensors inside, which stand for those of a GPU: the loss passes over a chunk's logits at once there, and
    products of lower precision are written in fp32 as they are."""

    def no_values(piece: Piece, seed: int) -> Tensor:
        return torch.empty(0).expand(piece.box.size) if 0 in piece.box.size else torch.empty(()).expand(piece.box.size)

    def wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        return x.new_empty((x.shape[0], y.shape[0]), dtype=dtype)

    resize = torch.UntypedStorage.resize_
    tracker = Tracker()

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # which no dispatcher sees
        result = resize(storage, size)
        tracker.note(storage)
        return result

    def to_host(copies: PlainCopier, x: Tensor) -> tuple[Tensor, None]:
        return tracker.copyon_host(x), None

    def is_host(copies: PlainCopier, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in tracker.on_host

    from_group = DeviceMesh.from_group

    def real_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:  # a mesh reads the ranks out of its tensor
        with unset_fake_temporarily():
            return from_group(*args, **kwargs)

    gc.collect()
    with (
        mock.patch.object(DeviceMesh, "from_group", real_mesh),
        mock.patch.object(init, "initial_values", no_values),
        mock.patch.object(loss, "CACHE_BYTES", 1 << 62),
        mock.patch.object(matmul, "wide_product", wide_product),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        mock.patch.multiple(PlainCopier, to_host=to_host, is_host=is_host),
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
