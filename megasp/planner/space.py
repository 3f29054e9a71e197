"""Every combination that the planner may try: values of the flags that it is free to choose.

What the user gives stands; the rest is tried. Whether a combination is legal is for `validate` to say, as in training.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megasp.config.host_offload import HostOffloadConfig
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.errors import ConfigError
from megasp.planner import attention
from megasp.planner.hardware import Hardware
from megasp.planner.job import Job, Redone

Values = dict[str, Any]
"""Field of the configuration -> value."""

CHUNKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
"""Virtual stages of a rank that are tried; only those that split the layers evenly, where some do."""

MICRO_BATCHES = (1, 2, 4, 8, 16)

RECOMPUTES: tuple[Values, ...] = (
    {},
    {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "mlp_act")},
    {"recompute_granularity": "all-but-attention"},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "full", "tiled_mlp": 8},
    {"recompute_granularity": "full", "tiled_mlp": 8, "cpu_offloading_activations": True},
)
"""From the fastest to the one that keeps least."""

LONGEST: Values = {"recompute_granularity": "full", "tiled_mlp": 64, "cpu_offloading_activations": True}
"""What keeps least of all but chunks of the sequence, beside `HOST`."""

CHUNK = 16384
"""Positions of a rank in a chunk of the sequence: as few as hide its copies from and to the host, and some more."""

HOST: tuple[Values, ...] = (
    {"optimizer_cpu_offload": True},
    {"optimizer_cpu_offload": True, "cpu_offloading_weights": True},
)
"""What the host's memory may take over, beside ZeRO-3, where nothing fits otherwise."""

SHARDING = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@dataclass(frozen=True)
class Request:
    """What a user asks.

    Attributes:
        config: everything that was given; the rest at its default.
        given: names of the fields that were given, and so stand.
        gpus: how many.
        host: whether optimizer and weights may go to the host's memory; what fits without is faster.
    """

    config: Config
    given: frozenset[str]
    gpus: int
    hardware: Hardware
    host: bool = False

    @cached_property
    def attention_kernel(self) -> str | None:
        """The attention kernel to name, where the planner may choose it and one is faster than what is meant."""
        return attention.fastest(self.config, self.hardware) if self.free("attention_backend") else None

    def free(self, name: str) -> bool:
        """Whether the planner may choose this field."""
        return name not in self.given

    def allows(self, values: Values) -> bool:
        """Whether these fields leave everything as it was given."""
        kept = {name: value for name, value in values.items() if not self.free(name)}
        return self.with_values(kept) == self.config

    def with_values(self, values: Values) -> Config:
        """The configuration with these fields."""
        return with_values(self.config, values)

    def legal(self, values: Values) -> tuple[Config, Layout]:
        """Configuration and layout.

        Raises:
            ConfigError: it cannot run.
        """
        config = self.with_values(values)
        return config, validate(config, self.gpus, "cuda")

    def is_legal(self, axes: Values) -> bool:
        """Whether axes can run, with one sample in a microbatch where that is free."""
        try:
            self.legal(axes | ({"micro_batch_size": 1} if self.free("micro_batch_size") else {}))
        except ConfigError:
            return False
        return True


def with_values(config: Config, values: Values) -> Config:
    """A configuration with some fields changed, each in the group that has it."""
    changed = {}
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        mine = {name: value for name, value in values.items() if hasattr(part, name)}
        if mine:
            changed[group.name] = dataclasses.replace(part, **mine)
    return dataclasses.replace(config, **changed)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(request: Request) -> Iterator[Values]:
    """Sizes of the axes, and how the ring's ranks exchange. Sizes that no rule could accept are left out: more tensor
    or Ulysses ranks than heads, more stages than layers, more replicas than samples."""
    config, gpus = request.config, request.gpus
    parallel, model = config.parallel, config.model
    batch = config.training.global_batch_size or gpus

    def sizes(name: str, limit: int, given: int | None = None) -> list[int]:
        chosen = given if given is not None else getattr(parallel, name)
        return [n for n in divisors(gpus) if n <= limit] if request.free(name) else [chosen or 1]

    for tp in sizes("tensor_model_parallel_size", model.num_attention_heads):
        for pp in sizes("pipeline_model_parallel_size", model.num_layers):
            for ulysses in sizes("ulysses_size", model.num_attention_heads // tp):
                for ring in sizes("ring_size", gpus):
                    ranks = tp * pp * ulysses * ring
                    cp = parallel.context_parallel_size
                    if gpus % ranks or gpus // ranks > batch or cp not in (None, ulysses * ring):
                        continue
                    for mode in _ring_modes(request, ring):
                        yield _axes(request, tp, pp, ulysses, ring) | mode


def _axes(request: Request, tp: int, pp: int, ulysses: int, ring: int) -> Values:
    values: Values = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "ulysses_size": ulysses,
        "ring_size": ring,
    }
    if request.free("sequence_parallel"):
        values["sequence_parallel"] = tp > 1
    if request.attention_kernel is not None:
        values["attention_backend"] = request.attention_kernel
    return values


def _ring_modes(request: Request, ring: int) -> list[Values]:
    """all_gather sends as much as p2p, and is tried where it is asked for."""
    if not request.free("cp_comm_type"):
        return [{}]
    return [{"cp_comm_type": mode} for mode in ("p2p", "lightseq")] if ring > 1 else [{}]


def schedules(request: Request, pp: int) -> Iterator[Values]:
    """Orders of a pipeline's work. gpipe is never tried: 1f1b takes as long and holds fewer microbatches."""
    config = request.config
    if pp == 1 or not request.free("pipeline_model_parallel_layout"):
        yield {}
        return
    if not (request.free("pipeline_schedule") and request.free("num_virtual_stages_per_pipeline_rank")):
        yield {}
        return
    for name in ("1f1b", "zb-h1", "zbv"):
        if name != "zbv" or 2 * pp <= config.model.num_layers:
            yield {"pipeline_schedule": name}
    possible = [chunks for chunks in CHUNKS if pp * chunks <= config.model.num_layers]
    even = [chunks for chunks in possible if config.model.num_layers % (pp * chunks) == 0]
    for chunks in even or possible:
        yield {"pipeline_schedule": "interleaved", "num_virtual_stages_per_pipeline_rank": chunks}


def micro_batches(request: Request, dp: int) -> Iterator[Values]:
    """Samples of a forward pass."""
    training = request.config.training
    batch = training.global_batch_size or dp
    if not request.free("micro_batch_size"):
        yield {}
        return
    for size in MICRO_BATCHES:
        if batch % (size * dp) == 0:
            yield {"micro_batch_size": size}


@dataclass(frozen=True)
class Recompute:
    """What is computed twice or kept elsewhere, so that less is kept.

    Attributes:
        values: of the configuration.
        redone: what is recomputed; None where the request says it.
        offloaded: share of the layers whose kept activations go to the host; `chunks`: of the sequence, whose keys and
            values do.
        saves: how much; one whose numbers are none of them smaller than another's needs no more of the GPU.
    """

    values: Values
    redone: Redone | None
    offloaded: float
    chunks: int
    saves: tuple[int, int]

    def applied(self, job: Job) -> Job:
        """The job with it."""
        again = job.recompute if self.redone is None else self.redone
        return dataclasses.replace(
            job, recompute=again, offload_activations=self.offloaded, offload_attention=self.chunks
        )


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimizer are spread over ranks and host.

    Attributes:
        values: of the configuration.
        layout: with this sharding.
        host: what is on the host.
        saves: as a recompute's.
    """

    values: Values
    layout: Layout
    host: HostOffloadConfig
    saves: tuple[int, int, int, int]

    def applied(self, job: Job) -> Job:
        """The job with it."""
        return dataclasses.replace(
            job,
            zero=self.layout.zero,
            layout=self.layout,
            offload_optimizer=self.host.moved_share,
            offload_weights=self.host.cpu_offloading_weights,
        )


def recomputes(request: Request, layout: Layout) -> list[Recompute]:
    """Every recompute that may be tried on a layout, the fastest first."""
    free = [request.free(name) for name in ("recompute_granularity", "recompute_method", "recompute_modules")]
    ordered: list[Values] = [{}]
    chunked: list[Values] = []
    if all(free):
        ordered = [each for each in (*RECOMPUTES, *[LONGEST] * request.host) if request.allows(each)] or [{}]
        chunked = [each for each in _chunked(request, layout) if request.allows(each)] if request.host else []

    def made(values: Values, saves: tuple[int, int]) -> Recompute:
        activations = request.with_values(values).activations
        redone = Redone.of(activations) if values else None
        return Recompute(
            values, redone, float(activations.cpu_offloading_activations), activations.chunks_on_host, saves
        )

    first = [made(values, (place, 0)) for place, values in enumerate(ordered)]
    return first + [made(values, (0, place)) for place, values in enumerate(chunked, 1)]


def shardings(request: Request, layout: Layout) -> list[Sharding]:
    """Every sharding of a layout, those that shard least first."""
    stages: list[int | None] = [*range(len(SHARDING))]
    if not (request.free("data_parallel_sharding_strategy") and request.free("use_distributed_optimizer")):
        stages = [None]
    elif layout.dp * layout.cp == 1:
        stages = [0]
    made = []

    def add(values: Values, zero: int, outer: int, host: HostOffloadConfig, moved: int = 0) -> None:
        this = dataclasses.replace(layout, zero=zero, dp_outer=outer, dp_inner=layout.dp // outer)
        # ZeRO-3 holds gathered layers, which may be more than a rank's own weights.
        made.append(Sharding(values, this, host, (zero % 3, zero // 3, int(outer == 1), moved)))

    for stage in stages:
        zero = request.config.parallel.zero_stage if stage is None else stage
        values = {} if stage is None else {"data_parallel_sharding_strategy": SHARDING[zero]}
        for instances, outer in _instances(request, layout, zero):
            add(values | instances, zero, outer, request.config.offload)
    for more, extra in enumerate(HOST, 1):
        if request.host and None not in stages and request.allows(extra):
            zero = 3 if layout.dp * layout.cp > 1 or len(extra) > 1 else 0
            values = {"data_parallel_sharding_strategy": SHARDING[zero]} | extra
            add(values, zero, 1, request.with_values(extra).offload, more)
    return made


def _chunked(request: Request, layout: Layout) -> list[Values]:
    """Chunks of the sequence; then with layers, alone and in groups, that keep one input, which ask less of the host
    and run again."""
    positions = request.config.training.seq_length // (layout.cp * layout.tp)
    chunks = next((n for n in range(positions // CHUNK, 1, -1) if positions % n == 0), 1)
    if layout.ring > 1 or chunks == 1:
        return []
    away: Values = {"sequence_chunks": chunks, "cpu_offloading_attention": True, "cpu_offloading_activations": True}
    groups = [away | {"recompute_granularity": "full", "recompute_num_layers": number} for number in (1, 2, 4)]
    return [away, *groups]


def _instances(request: Request, layout: Layout, zero: int) -> list[tuple[Values, int]]:
    """Hybrid sharding: over all ranks, or inside a node and replicated beyond it; with the number of replicas."""
    if not request.free("num_distributed_optimizer_instances"):
        return [({}, layout.dp_outer)]
    options: list[tuple[Values, int]] = [({}, 1)]
    across = layout.tp * layout.cp * layout.dp // request.hardware.node_gpus
    if zero and 1 < across < layout.dp and layout.dp % across == 0:
        options.append(({"num_distributed_optimizer_instances": across}, across))
    return options
