"""Builds what a run trains, in one visible order: stages, master weights and gradient sync, pipeline, optimizer."""

from dataclasses import dataclass

import torch
from torch import nn

from megasp.config.context_parallel import split_context
from megasp.config.schema import Config
from megasp.config.stages import split
from megasp.data_parallel import Replicas
from megasp.model import Factory, GPTModel
from megasp.parallel_state import ParallelState
from megasp.pipeline.executor import Pipeline
from megasp.pipeline.schedules import placement
from megasp.sequence_parallel import Mask, SequenceAttention, kernels
from megasp.shard_map import ShardMap
from megasp.training.optimizer import build_optimizer


@dataclass
class Training:
    """One rank's part of a run."""

    config: Config
    state: ParallelState
    shard_map: ShardMap
    model: nn.ModuleList
    pipeline: Pipeline
    replicas: Replicas
    optimizer: torch.optim.AdamW
    attention_kernel: str

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
        dtype: compute dtype; bfloat16 or float32 as the configuration says without it.
    """
    dtype = dtype or (torch.bfloat16 if config.training.bf16 else torch.float32)
    kernel = attention_kernel(config, state.device, dtype)
    context = split_context(config)
    seq_length, ring = config.training.seq_length, state.ring.size
    if ring == 1 or context.ring_mode == "lightseq":  # which balances contiguous shards by itself
        shard_map = ShardMap.contiguous(seq_length, state.cp.size)
    else:
        shard_map = ShardMap.zigzag(seq_length, ring, state.ulysses.size)
    mask = Mask(config.model.window_size, config.model.attention_sinks)
    plan = config.pipeline
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    stages = {
        stage.number: GPTModel(
            config.model,
            state,
            layers=stage.layers,
            first=stage.first,
            last=stage.last,
            sequence_parallel=config.parallel.sequence_parallel,
            attend=SequenceAttention(state, shard_map, kernel, context.ring_mode, mask),
            recompute=config.activations.recompute,
            tiled_mlp=config.activations.tiled_mlp,
            offloaded_layers=config.activations.offloaded(len(stage.layers)),
            factory=Factory(state.device, dtype, config.training.seed),
        )
        for stage in split(config)
        if owner[stage.number] == state.pp.rank
    }
    model = nn.ModuleList(stages.values())
    replicas = Replicas(model, state.gradients)
    pipeline = Pipeline(plan, stages, state, replicas.begin_microbatch)
    optimizer = build_optimizer(replicas.masters, config.optimizer)
    return Training(config, state, shard_map, model, pipeline, replicas, optimizer, kernel)


def attention_kernel(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that --attention-backend means on this machine.

    Raises:
        ConfigError: it cannot serve this configuration.
    """
    model = config.model
    backend = config.training.attention_backend
    return kernels.choose(backend, device.type, dtype, model.attention_dropout, model.head_dim)
