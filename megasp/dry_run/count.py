"""What one rank of a layout holds, sends and computes in a step."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasp import parallel_state
from megasp.config.kernels import KernelConfig, choose_kernel
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data import Batch
from megasp.data_parallel import Replicas, global_norm, sum_partial_, sum_tied_
from megasp.dry_run.stand_ins import RepeatedKV, fake_tensors
from megasp.dry_run.tracker import Tracker
from megasp.pipeline.schedules import Action
from megasp.sequence_parallel.kernels import KERNELS
from megasp.training import communication
from megasp.training.build import Training, build
from megasp.training.volumes import Volume, closed_forms

NEARLY = 0.99
"""Of the peak of the step before: from there on it is looked at who holds what."""


@dataclass(frozen=True)
class Count:
    """Of one rank.

    Attributes:
        built, passes, optimizer: bytes after the build, and the peaks of a step's passes and of its optimizer.
        volume: what the step sent, and computed.
        formula: the same in closed form.
        host: bytes that the host holds between steps; `host_passes`: the peak of a step's passes there.
        parts: component -> bytes at the peak, where there were two steps or it was expected; messages are among the
            activations.
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

    @property
    def on_host(self) -> int:
        """The most that is in the host's memory."""
        return max(self.host, self.host_passes)


def count(config: Config, layout: Layout, rank: int = 0, steps: int = 2, expected: float = 0) -> Count:
    """What one rank of the layout holds, in bytes, in the last of some steps.

    Args:
        config: validated for this layout.
        expected: bytes from which on it is looked at who holds what, where there is one step.
    """
    attention: dict[tuple[str, str], Any] = {("flash", "cpu"): RepeatedKV()} if _gpu_kernel(config) == "fused" else {}
    config = _kernel_of_a_gpu(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        state = parallel_state.build(layout, torch.device("cpu"))
        with mock.patch.dict(KERNELS, attention), fake_tensors() as tracker:
            training = build(config, state)
            for tensor, is_pinned in _on_host(training):
                tracker.move_to_host(tensor, is_pinned)
            built = tracker.live
            batches = [microbatch(training) for _ in range(config.num_microbatches(layout))]
            tracker.holders = partial(_holders, training)
            training.pipeline.watch = partial(_number, tracker)
            fullest = 0
            tracker.look_for(expected or math.inf)
            for _ in range(steps):
                if fullest:
                    tracker.look_for(NEARLY * fullest)
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
                fullest = max(passes, tracker.peak)
            volume, formula = Volume(_sent(training), tracker.flops), closed_forms(training, batches)
            parts = {name: size for name, size in tracker.parts.items() if size}
            return Count(built, passes, tracker.peak, volume, formula, tracker.host, host_passes, parts)
    finally:
        dist.destroy_process_group()


def _holders(training: Training) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are no activations, by component."""
    replicas, optimizer = training.replicas, training.optimizer
    yield from (("gradients", x) for x in replicas.gradients())
    yield from (("optimizer states", x) for kept in optimizer.state.values() for x in kept.values())
    yield from (("master weights", x) for x in optimizer.masters)
    whole = replicas.parameters if isinstance(replicas, Replicas) else replicas.whole_for_a_step()
    yield from (("parameters", x) for x in whole)


def _number(tracker: Tracker, event: str, action: Action) -> None:
    tracker.action += event == "start"


def _on_host(training: Training) -> list[tuple[Tensor, bool]]:
    """What the build leaves in the host's memory, and whether it is pinned: masters and moments, or the shards
    themselves, which are."""
    optimizer, everything = training.optimizer, training.config.offload.cpu_offloading_weights
    pairs = zip(optimizer.masters, training.replicas.masters, strict=True)
    away = [master for master, weight in pairs if everything or master is not weight]
    moments = [(x, False) for master in away for x in optimizer.state[master].values()]
    return [*((master, everything) for master in away), *moments]


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


def microbatch(training: Training) -> Batch:
    """A microbatch of this rank."""
    config, state = training.config, training.state
    shape = config.training.micro_batch_size, config.training.seq_length // state.cp.size
    tokens = np.zeros(shape, np.int64)
    positions = np.arange(shape[1])
    return Batch(tokens, tokens, np.ones(shape, np.float32), positions, np.arange(shape[0]))
