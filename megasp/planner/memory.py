"""What a GPU of each pipeline rank needs: the exact account of `training/memory.py`, and what lies outside of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from megasp.config.layout import Layout
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import Config
from megasp.config.stages import split
from megasp.data_parallel.memory import state_bytes
from megasp.model import fp8
from megasp.model.memory import end_parameters, layer_footprint, layer_parameters
from megasp.pipeline.schedules import placement, schedule
from megasp.pipeline.simulate import live_activations
from megasp.training.memory import account, sizes_of

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
    return [Memory(each.pipeline_rank, dict(each.rows()), each.host) for each in accounts]


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
class Floor:
    """What the first pipeline rank holds at least: weights, gradients, optimizer, kept activations. Much faster than
    the account, of the same parts, and never above it.

    Attributes:
        elements: its parameters; `unit`: those of a layer.
        kept: bytes of all microbatches that are alive at a time.
        item, gradient_item: bytes of an element of the weights and of the gradients' sums.
    """

    elements: int
    unit: int
    kept: float
    item: int
    gradient_item: int | None

    @classmethod
    def of(cls, config: Config, layout: Layout) -> "Floor":
        """Of a schedule, a microbatch and a recompute; sharding is no part of it."""
        model, plan = config.model, config.pipeline
        owner = placement(plan.schedule, plan.ranks, plan.chunks)
        counts = [len(stage.layers) for stage in split(config) if owner[stage.number] == 0]
        layer = layer_parameters(model, layout.tp)
        ends = end_parameters(model, layout.tp, True, owner[-1] == 0)
        sizes = sizes_of(config, layout, "cuda")
        recompute = config.activations.recompute
        kept = min(
            layer_footprint(model, replace(sizes, products=products), recompute).total
            for products in {fp8.products(config.fp8, number, model.num_layers) for number in range(model.num_layers)}
        )
        layers = kept / recompute.num_layers * min(counts)
        return cls(
            sum(counts) * layer + sum(ends.values()),
            layer,
            layers * _live(plan, min(config.num_microbatches(layout), ROUNDS * layout.pp)),
            sizes.item,
            2 if config.training.grad_reduce_in_bf16 else None,
        )

    def needed(self, layout: Layout) -> float:
        """What a GPU must have, with the layout's sharding."""
        shards = layout.dp_inner * layout.cp
        states = state_bytes(
            self.elements, self.unit, 0, self.item, shards * layout.dp_outer, shards, layout.zero, self.gradient_item
        )
        fixed = states.parameters + states.masters + states.optimizer + (0 if states.growing else states.gradients)
        return with_outside(fixed + self.kept)


@cache
def _live(plan: PipelinePlan, microbatches: int) -> int:
    """Live activations of the first rank, in chunks."""
    return live_activations(schedule(plan.schedule, plan.ranks, microbatches, plan.chunks).rows[0])
