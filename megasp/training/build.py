"""Builds what a run trains, in one visible order: stages, master weights and gradient sync, pipeline, optimizer."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from megasp.config.context_parallel import split_context
from megasp.config.kernels import NORM_KERNELS, OPTIMIZER_KERNELS
from megasp.config.schema import Config
from megasp.config.stages import split
from megasp.config.tiles import head_bytes, mlp_tiles
from megasp.data_parallel import Replicas, WeightShards
from megasp.data_parallel.replicas import master_dtype
from megasp.host_copies import copier
from megasp.model import Factory, GPTModel, compiled, linear_kernels
from megasp.model.elementwise import eager
from megasp.model.kernels import Kernels
from megasp.model.norm_kernels import NORMS
from megasp.parallel_state import ParallelState
from megasp.pipeline.executor import Pipeline
from megasp.pipeline.schedules import placement
from megasp.sequence_parallel import Mask, SequenceAttention, kernels
from megasp.sequence_parallel.shards import Shards, shards
from megasp.training.host_optimizer import MasterOptimizer
from megasp.training.loss_scale import LossScale


@dataclass
class Training:
    """One rank's part of a run."""

    config: Config
    state: ParallelState
    shards: Shards
    model: nn.ModuleList
    pipeline: Pipeline
    replicas: Replicas | WeightShards
    optimizer: MasterOptimizer
    loss_scale: LossScale
    attention_kernel: str
    norm_kernel: str
    optimizer_kernel: str

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
    backend = linear_kernels.choose(config.fp8, state.device) if config.fp8.fp8_format is not None else None
    kernel = attention_kernel(config, state.device, dtype)
    norms, stepper = other_kernels(config, state.device, dtype)
    held, attend = _attention(config, state, kernel)
    activations, plan = config.activations, config.pipeline
    zero, weights_on_host = config.parallel.zero_stage, config.offload.cpu_offloading_weights
    shares_out = zero > 0 and (state.axes["dp_cp"].size > 1 or weights_on_host)
    factory = Factory(state.device, dtype, config.training.seed)
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
            kernels=Kernels(NORMS[norms], compiled.compiled if config.kernels.compile else eager),
            offloaded_layers=activations.offloaded(len(stage.layers)),
            products=partial(linear_kernels.products, config.fp8, layers=config.model.num_layers, backend=backend),
            factory=replace(factory, device="meta") if shares_out else factory,
        )
        for stage in split(config)
        if owner[stage.number] == state.pp.rank
    }
    model = nn.ModuleList(stages.values())
    gradient_dtype = torch.bfloat16 if config.training.grad_reduce_in_bf16 else None
    widen = config.training.widens_gradients(state.device.type)
    replicas: Replicas | WeightShards
    if shares_out:
        deferred = plan.defers_weight_gradients
        replicas = WeightShards(
            list(stages.values()), factory, state, zero, gradient_dtype, deferred, widen, weights_on_host
        )
    else:
        replicas = Replicas(model, state.gradients, gradient_dtype, widen, config.offload.optimizer_share)
    pipeline = Pipeline(plan, stages, state, replicas.begin_microbatch, dtype)
    optimizer = MasterOptimizer(replicas.masters, config.optimizer, config.offload.optimizer_share, stepper)
    loss_scale = LossScale.of(config)
    return Training(config, state, held, model, pipeline, replicas, optimizer, loss_scale, kernel, norms, stepper)


def _attention(config: Config, state: ParallelState, kernel: str) -> tuple[Shards, SequenceAttention]:
    """Who holds which positions, and attention over them."""
    context, parallel, activations = split_context(config), config.parallel, config.activations
    mask, chunks = Mask(config.model.window_size, config.model.attention_sinks), activations.sequence_chunks
    split_over = state.tp.size if parallel.sequence_parallel else 1
    sizes = config.training.seq_length, state.ring.size, state.ulysses.size
    held = shards(*sizes, context.ring_mode, mask, chunks, split_over)
    copies = copier(state.device) if activations.cpu_offloading_attention else None
    options = context.ring_mode, mask, parallel.ulysses_head_chunks
    return held, SequenceAttention(state, held, kernel, *options, sequence_chunks=chunks, copies=copies)


def attention_kernel(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that --attention-backend means on this machine.

    Raises:
        ConfigError: it cannot serve this configuration.
    """
    model = config.model
    backend = config.training.attention_backend
    return kernels.choose(backend, device.type, dtype, model.attention_dropout, model.head_dim)


def other_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernels that --norm-backend and --optimizer-backend mean on this machine.

    Raises:
        ConfigError: one cannot serve this, or is not installed.
    """
    compute, masters = (str(each).removeprefix("torch.") for each in (dtype, master_dtype(dtype)))
    norm, optimizer = config.kernels.chosen(device.type, compute, masters)
    NORM_KERNELS[norm].require(f"--norm-backend {norm}")
    OPTIMIZER_KERNELS[optimizer].require(f"--optimizer-backend {optimizer}")
    if config.kernels.compile or norm == "compiled":
        compiled.check(device.type, "--compile" if config.kernels.compile else "--norm-backend compiled")
    return norm, optimizer
