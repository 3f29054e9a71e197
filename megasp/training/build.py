"""Builds what a run trains, in one visible order: stages, master weights and gradient sync, pipeline, optimizer."""

from dataclasses import dataclass

import torch
from torch import nn

from megasp.config.context_parallel import split_context
from megasp.config.schema import Config
from megasp.config.stages import split
from megasp.config.tiles import head_bytes, mlp_tiles
from megasp.data_parallel import Replicas, WeightShards
from megasp.host_copies import copier
from megasp.model import Factory, GPTModel
from megasp.parallel_state import ParallelState
from megasp.pipeline.executor import Pipeline
from megasp.pipeline.schedules import placement
from megasp.sequence_parallel import Mask, SequenceAttention, kernels
from megasp.sequence_parallel.shards import Shards, shards
from megasp.training.loss_scale import LossScale
from megasp.training.optimizer import build_optimizer


@dataclass
class Training:
    """One rank's part of a run."""

    config: Config
    state: ParallelState
    shards: Shards
    model: nn.ModuleList
    pipeline: Pipeline
    replicas: Replicas | WeightShards
    optimizer: torch.optim.AdamW
    loss_scale: LossScale
    attention_kernel: str

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products."""
        return self.pipeline.dtype

    @property
    def tied(self) -> list[nn.Parameter]:
        """This rank's copies of the embedding, where it is tied to the head."""
        if self.config.model.untie_embeddings_and_output_weights:
            return []
        return [p for p in self.replicas.masters if p.pieces[0].name == "embedding.weight"]  # type: ignore[attr-defined]


def build(config: Config, state: ParallelState, dtype: torch.dtype | None = None) -> Training:
    """Everything that this rank trains.

    Args:
        config: validated.
        dtype: compute dtype; as the configuration says without it.
    """
    dtype = dtype or getattr(torch, config.training.compute_dtype)
    kernel = attention_kernel(config, state.device, dtype)
    context = split_context(config)
    mask = Mask(config.model.window_size, config.model.attention_sinks)
    activations, plan = config.activations, config.pipeline
    chunks, split_over = activations.sequence_chunks, state.tp.size if config.parallel.sequence_parallel else 1
    held = shards(
        config.training.seq_length, state.ring.size, state.ulysses.size, context.ring_mode, mask, chunks, split_over
    )
    attend = SequenceAttention(
        state,
        held,
        kernel,
        context.ring_mode,
        mask,
        config.parallel.ulysses_head_chunks,
        sequence_chunks=chunks,
        copies=copier(state.device) if activations.cpu_offloading_attention else None,
    )
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    stages = {
        stage.number: GPTModel(
            config.model,
            state,
            layers=stage.layers,
            first=stage.first,
            last=stage.last,
            sequence_parallel=config.parallel.sequence_parallel,
            attend=attend,
            recompute=activations.recompute,
            tiled_mlp=mlp_tiles(config, state.layout),
            head_bytes=head_bytes(config),
            offloaded_layers=activations.offloaded(len(stage.layers)),
            factory=Factory(state.device, dtype, config.training.seed),
        )
        for stage in split(config)
        if owner[stage.number] == state.pp.rank
    }
    model = nn.ModuleList(stages.values())
    gradient_dtype = torch.bfloat16 if config.training.grad_reduce_in_bf16 else None
    widen = config.training.widens_gradients(state.device.type)
    replicas: Replicas | WeightShards
    zero = config.parallel.zero_stage
    if zero and state.axes["dp_cp"].size > 1:
        replicas = WeightShards(list(stages.values()), state, zero, gradient_dtype, plan.defers_weight_gradients, widen)
    else:
        replicas = Replicas(model, state.gradients, gradient_dtype, widen)
    pipeline = Pipeline(plan, stages, state, replicas.begin_microbatch, dtype)
    optimizer = build_optimizer(replicas.masters, config.optimizer)
    loss_scale = LossScale.of(config)
    return Training(config, state, held, model, pipeline, replicas, optimizer, loss_scale, kernel)


def attention_kernel(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that --attention-backend means on this machine.

    Raises:
        ConfigError: it cannot serve this configuration.
    """
    model = config.model
    backend = config.training.attention_backend
    return kernels.choose(backend, device.type, dtype, model.attention_dropout, model.head_dim)
