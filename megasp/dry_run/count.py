"""What one rank of a layout holds, sends and computes in a step."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

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
from megasp.data_parallel import global_norm, sum_partial_, sum_tied_
from megasp.dry_run.stand_ins import fake_tensors
from megasp.training import communication
from megasp.training.build import Training, build
from megasp.training.volumes import Volume, closed_forms


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

    @property
    def on_host(self) -> int:
        """The most that is in the host's memory."""
        return max(self.host, self.host_passes)


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
            for tensor in _on_host(training):
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


def _on_host(training: Training) -> list[Tensor]:
    """What the build leaves in the host's memory: masters and moments, or the shards themselves."""
    optimizer, everything = training.optimizer, training.config.offload.cpu_offloading_weights
    pairs = zip(optimizer.masters, training.replicas.masters, strict=True)
    away = [master for master, weight in pairs if everything or master is not weight]
    return [tensor for master in away for tensor in (master, *optimizer.state[master].values())]


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


def _batch(training: Training) -> Batch:
    """A microbatch of this rank."""
    config, state = training.config, training.state
    shape = config.training.micro_batch_size, config.training.seq_length // state.cp.size
    tokens = np.zeros(shape, np.int64)
    positions = np.arange(shape[1])
    return Batch(tokens, tokens, np.ones(shape, np.float32), positions, np.arange(shape[0]))
