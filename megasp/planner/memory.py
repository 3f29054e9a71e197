"""What a GPU of each pipeline rank needs: the exact account of `training/memory.py`, and what lies outside of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from megasp.config.host_offload import HostOffloadConfig
from megasp.config.layout import Layout
from megasp.config.model import ModelConfig
from megasp.config.recompute import ActivationConfig
from megasp.config.schema import Config
from megasp.config.stages import split
from megasp.data_parallel.memory import Sharding
from megasp.model.memory import Sizes, end_parameters, layer_parameters, stage_layers
from megasp.pipeline.schedules import placement, schedule
from megasp.training.memory import COPY, account

OUTSIDE = 3.0e9
"""Bytes that are not PyTorch's: the CUDA context, NCCL's buffers, libraries' workspaces. An assumption."""

FRAGMENTATION = 0.04
"""Share of what PyTorch holds that its allocator cannot use (with expandable segments). An assumption."""

ROUNDS = 2
"""A schedule holds most within the first microbatches, so many times the pipeline's ranks."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank, by component, and what it keeps in the host's memory."""

    rank: int
    parts: dict[str, float]
    host: float = 0.0

    @property
    def allocated(self) -> float:
        """Peak of what PyTorch allocates."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return with_outside(self.allocated)


def with_outside(allocated: float) -> float:
    """What a GPU must have to allocate so much."""
    return allocated * (1 + FRAGMENTATION) + OUTSIDE


def memory(config: Config, layout: Layout, ranks: Sequence[int] | None = None) -> list[Memory]:
    """Of all pipeline ranks, or of some."""
    short = shortened(config, layout)
    chosen = range(layout.pp) if ranks is None else ranks
    accounts = [account(short, layout, rank) for rank in chosen]
    # The copy for a checkpoint is made by the ranks that write alone, which a run checks on its machine.
    return [Memory(each.pipeline_rank, dict(each.rows()), each.on_host - each.host.get(COPY, 0)) for each in accounts]


def ends(layout: Layout) -> list[int]:
    """The pipeline ranks that hold most: the first has most microbatches at a time, the last the head."""
    return sorted({0, layout.pp - 1})


def shortened(config: Config, layout: Layout) -> Config:
    """With as few microbatches as reach the peak."""
    microbatches = config.num_microbatches(layout)
    few = min(microbatches, ROUNDS * layout.pp)
    batch = few * config.training.micro_batch_size * layout.dp
    return replace(config, training=replace(config.training, global_batch_size=batch, rampup_batch_size=()))


@dataclass(frozen=True)
class End:
    """A pipeline rank at an end, whatever a microbatch is.

    Attributes:
        elements: its parameters.
        layers: of each of its stages.
        held: most forwards that wait for their backward at a time, those not counted that wait for W alone; what runs
            next is a backward, with all of them there.
    """

    elements: int
    layers: tuple[int, ...]
    held: int


def pipeline_ends(config: Config, layout: Layout) -> tuple[End, ...]:
    """Both ends of a configuration's pipeline."""
    model, plan = config.model, config.pipeline
    owner, stages = placement(plan.schedule, plan.ranks, plan.chunks), split(config)
    few = min(config.num_microbatches(layout), ROUNDS * layout.pp)
    rows = schedule(plan.schedule, plan.ranks, few, plan.chunks).rows
    made = []
    for rank in ends(layout):
        mine = [stage for stage in stages if owner[stage.number] == rank]
        beside = [end_parameters(model, layout.tp, stage.first, stage.last) for stage in mine]
        counts = tuple(len(stage.layers) for stage in mine)
        elements = sum(counts) * layer_parameters(model, layout.tp) + sum(sum(each.values()) for each in beside)
        held = max(accumulate({"F": 1, "W": 0}.get(action.kind, -1) for action in rows[rank]))
        made.append(End(elements, counts, held))
    return tuple(made)


@dataclass(frozen=True)
class Floor:
    """What the fullest GPU holds at least: weights, gradients, optimizer, kept activations and a layer's backward. Much
    faster than the account, of the same parts, and never above it.

    Attributes:
        ends: (parameters, bytes of a backward while most microbatches are held).
        unit: parameters of a layer.
        item, gradient_item: bytes of an element of the weights and of the gradients' sums.
        microbatches: of a step.
    """

    ends: tuple[tuple[int, int], ...]
    unit: int
    item: int
    gradient_item: int
    microbatches: int

    @classmethod
    def of(cls, pipeline: tuple[End, ...], config: Config, sizes: Sizes, microbatches: int) -> "Floor":
        """Of a schedule, a microbatch and a recompute; sharding is no part of it."""
        found = []
        for end in pipeline:
            layers = [_layers(config.model, sizes, config.activations, count) for count in end.layers]
            kept = end.held * min(kept for kept, _ in layers) + min(working for _, working in layers)
            found.append((end.elements, kept))
        gradient_item = 2 if config.training.grad_reduce_in_bf16 else max(sizes.item, 4)
        return cls(tuple(found), layer_parameters(config.model, sizes.tp), sizes.item, gradient_item, microbatches)

    def needed(self, layout: Layout, host: HostOffloadConfig) -> float:
        """What a GPU must have, with the layout's sharding, and what is on the host."""
        return with_outside(max(self._allocated(layout, host, *end) for end in self.ends))

    def _allocated(self, layout: Layout, host: HostOffloadConfig, elements: int, backward: int) -> int:
        shards = layout.dp_inner * layout.cp
        sharding = Sharding(
            self.item,
            self.gradient_item,
            self.gradient_item,
            ranks=shards * layout.dp_outer,
            shards=shards,
            zero=layout.zero if shards > 1 or host.cpu_offloading_weights else 0,
            once=self.microbatches == 1,
            host_share=host.optimizer_share,
            host_weights=host.cpu_offloading_weights,
        )
        states = sharding.states(elements)
        held = states.parameters + states.masters + states.optimizer + states.gradients * states.buffered
        return held + sharding.whole(self.unit) + backward


@cache
def _layers(model: ModelConfig, sizes: Sizes, activations: ActivationConfig, count: int) -> tuple[int, int]:
    """What the layers of a stage keep of a microbatch, and what the last one's backward takes beside it."""
    layers = stage_layers(model, sizes, activations.recompute, [sizes.products] * count, activations.offloaded(count))
    return sum(layer.total for layer in layers), layers[-1].backward - layers[-1].total
