"""Seconds of a training step: layers and head by stage, the pipeline by its simulator, gradients, optimizer.

The pipeline is the one of pipeline/simulate.py, on the lists that train. Its steady state repeats, so that a step of
many microbatches is simulated with two smaller numbers of them and continued in a straight line, which is exact there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megasp.config.stages import Stage
from megasp.pipeline.schedules import Action, placement, schedule
from megasp.pipeline.simulate import Timeline, simulate
from megasp.planner.job import Job
from megasp.planner.layer_time import Parts, groups, layer_parts
from megasp.planner.rates import Group, Rates

OPTIMIZER_BYTES = 34.0
"""Read and written for a parameter: fp32 weight and both moments twice, gradient, bf16 weight, and the norm's read."""

HOST_OPTIMIZER_BYTES = 40.0
"""The same in the host's memory: the gradient arriving and read, fp32 weight and both moments twice, the weight read
again, written in bf16 to a pinned buffer, and fetched from there."""

HOST_CLIPPING_BYTES = 12.0
"""Of a gradient that is on the host: read for the norm, read and written to be clipped."""


@dataclass(frozen=True)
class StepTime:
    """A step's time and where it goes: `parts` are seconds, means over the pipeline's ranks, which sum to `seconds`."""

    job: Job
    seconds: float
    parts: Parts
    bubble: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.step_tokens / self.seconds / self.job.layout.world_size


@dataclass(frozen=True)
class StageTime:
    """Parts of a microbatch on one stage, by direction."""

    stage: Stage
    parts: dict[str, Parts]

    def seconds(self, kind: str) -> float:
        """Time of an action; B is I and W together."""
        if kind == "B":
            return self.seconds("I") + self.seconds("W")
        return sum(self.parts[kind].values())


def stage_times(job: Job, rates: Rates) -> list[StageTime]:
    """Every stage's parts."""
    layer = layer_parts(job, rates)
    made = []
    for stage in job.stages:
        parts = {kind: {name: seconds * len(stage.layers) for name, seconds in layer[kind].items()} for kind in "FIW"}
        if stage.last:
            for kind, extra in _head(job, rates).items():
                for name, seconds in extra.items():
                    parts[kind][name] = parts[kind].get(name, 0.0) + seconds
        made.append(StageTime(stage, parts))
    return made


def _head(job: Job, rates: Rates) -> dict[str, Parts]:
    """Logits, loss and their gradients, in bf16 products; megasp's head computes gradients in its forward."""
    vocabulary, hidden = job.model.padded_vocab_size / job.layout.tp, job.model.hidden_size
    product = rates.matmul(job.tokens, vocabulary, hidden)
    logits = rates.memory(job.tokens * vocabulary * (8 if job.software.fused else 8 * rates.fit.unfused))
    group = groups(job)["tp"]
    gather = rates.collective(group, 2 * job.tokens * hidden) if group.size > 1 else 0.0
    return {
        "F": {"matmul": product, "elementwise": logits, "tensor": gather},
        "I": {"matmul": rates.matmul(job.tokens, hidden, vocabulary), "elementwise": logits / 2, "tensor": gather},
        "W": {"matmul": rates.matmul(vocabulary, hidden, job.tokens)},
    }


def step_time(job: Job, rates: Rates) -> StepTime:
    """The step's time, from its busiest rank's point of view."""
    times = stage_times(job, rates)
    microbatch = {rank: _of_rank(job, times, rank) for rank in range(job.plan.ranks)}
    busiest = max(microbatch, key=lambda rank: sum(microbatch[rank].values()))
    names = dict.fromkeys(name for parts in microbatch.values() for name in parts)
    share = job.microbatches / job.plan.ranks
    parts = {name: share * sum(rank.get(name, 0.0) for rank in microbatch.values()) for name in names}
    work = job.microbatches * sum(microbatch[busiest].values())
    parts["imbalance"] = work - sum(parts.values())
    parts["pipeline"] = pipeline_seconds(job, rates, times) - work
    own = _of_rank_kinds(job, times, busiest)
    parts["data"] = _gradients(job, rates, own["F"], own["I"] + own["W"], busiest)
    parts["optimizer"] = _optimizer(job, rates, busiest)
    parts["overhead"] = parts.get("overhead", 0.0) + rates.fit.step_seconds
    seconds = sum(parts.values())
    return StepTime(job, seconds, parts, parts["pipeline"] / seconds)


def _of_rank(job: Job, times: list[StageTime], rank: int) -> Parts:
    """Parts of one microbatch through all chunks of a pipeline rank."""
    total: Parts = {}
    owner = placement(job.plan.schedule, job.plan.ranks, job.plan.chunks)
    for time in times:
        if owner[time.stage.number] == rank:
            for parts in time.parts.values():
                for name, seconds in parts.items():
                    total[name] = total.get(name, 0.0) + seconds
    return total


def pipeline_seconds(job: Job, rates: Rates, times: list[StageTime]) -> float:
    """Time of all microbatches through the pipeline."""
    ranks = job.plan.ranks
    busiest = max(sum(_of_rank(job, times, rank).values()) for rank in range(ranks))
    if ranks == 1:
        return job.microbatches * busiest
    if job.microbatches <= 5 * ranks:
        return timeline(job, rates, times, job.microbatches).makespan
    second = 4 * ranks + job.microbatches % ranks
    first = second - ranks
    short, long = (timeline(job, rates, times, number).makespan for number in (first, second))
    slope = max(busiest, (long - short) / ranks)
    return long + slope * (job.microbatches - second)


@dataclass(frozen=True)
class Microbatch:
    """Seconds of a microbatch by direction, of one layer and of the head: all that the schedules' closed forms need of
    a layout, microbatch, recompute and sharding, and so worth keeping."""

    layer: dict[str, float]
    head: dict[str, float]

    @classmethod
    def of(cls, job: Job, rates: Rates) -> "Microbatch":
        """Of a job, whatever its schedule."""
        layer, head = (
            {k: sum(parts.values()) for k, parts in made(job, rates).items()} for made in (layer_parts, _head)
        )
        return cls(layer, head)


def least_seconds(job: Job, rates: Rates, microbatch: Microbatch) -> float:
    """The pipeline's share of `quick_seconds`."""
    return _quick_pipeline(job, rates, microbatch)[0]


def quick_seconds(job: Job, rates: Rates, microbatch: Microbatch) -> float:
    """About the same as `step_time`, by the closed forms of the schedules' papers: what fills and drains the pipeline
    beside the busiest rank's work. For sorting; the answers that a person sees are simulated."""
    pipeline, busiest, (forward, inputs, weights) = _quick_pipeline(job, rates, microbatch)
    ends = _gradients(job, rates, forward, inputs + weights, busiest) + _optimizer(job, rates, busiest)
    return pipeline + ends + rates.fit.step_seconds


def _quick_pipeline(job: Job, rates: Rates, microbatch: Microbatch) -> tuple[float, int, list[float]]:
    """Seconds of all microbatches, the busiest rank, and its F, I and W of one."""
    ranks, chunks = job.plan.ranks, job.plan.chunks

    def seconds(load: tuple[int, int, int]) -> list[float]:
        layers, _, last = load
        return [layers * microbatch.layer[kind] + last * microbatch.head[kind] for kind in "FIW"]

    busiest = max(dict.fromkeys(reversed(job.loads)), key=lambda load: sum(seconds(load)))
    forward, inputs, weights = seconds(busiest)
    bubble = {
        "interleaved": (forward + inputs + weights) / chunks,
        "zb-h1": max(0.0, forward + inputs - weights),
        "zbv": max(0.0, forward + inputs - 2 * weights) / chunks,
    }.get(job.plan.schedule, forward + inputs + weights)
    work = job.microbatches * (forward + inputs + weights)
    pipeline = work + (ranks - 1) * (bubble + 2 * message_seconds(job, rates)) if ranks > 1 else work
    return pipeline, job.loads.index(busiest), [forward, inputs, weights]


def timeline(job: Job, rates: Rates, times: list[StageTime], microbatches: int) -> Timeline:
    """The simulated pipeline. Messages that do not run behind compute are a part of the action that ends with them, for
    sender and receiver meet there."""
    plan, message = job.plan, message_seconds(job, rates)
    shown = 0.0 if job.software.overlap_messages else message
    steps = schedule(plan.schedule, plan.ranks, microbatches, plan.chunks)
    return simulate(steps, action_cost(times, shown), message - shown)


def action_cost(times: list[StageTime], message: float = 0.0) -> Callable[[Action], float]:
    """Seconds of every action, with its `message`; weight gradients send none."""
    table = {
        (kind, time.stage.number): time.seconds(kind) + (message if kind != "W" else 0.0)
        for time in times
        for kind in "FBIW"
    }
    return lambda action: table[action.kind, action.stage]


def message_seconds(job: Job, rates: Rates) -> float:
    """Activations of a microbatch from one pipeline rank to the next."""
    layout = job.layout
    size = 2 * job.tokens * job.model.hidden_size / (layout.tp if job.sequence_parallel else 1)
    return rates.message(size, layout.world_size // layout.pp, layout.pp)


def _gradients(job: Job, rates: Rates, forward: float, backward: float, rank: int) -> float:
    """Gradients' reduction and the weights' way back, as far as the last backward and the first forward do not hide
    them; their last bucket, half a layer's, always shows. `forward` and `backward` are of a microbatch."""
    group, parameters = groups(job), job.rank_parameters(rank)
    shard, replicas = group["shard"], group["replicas"]
    width = job.software.gradient_bytes
    if shard.size * replicas.size == 1:
        return 0.0
    both = Group(shard.size * replicas.size, shard.stride)
    first = rates.collective(both, width * job.layer_parameters / 2, "reduce")
    if job.zero == 3:
        outer = rates.collective(replicas, width * parameters / shard.size, "reduce")
        return outer
    if not job.software.overlap_gradients:
        forward = backward = 0.0
    if job.zero == 0:
        return _exposed(rates.collective(both, width * parameters, "reduce"), backward, rates, first)
    if job.software.whole_gradients:
        reduce = rates.collective(both, width * parameters, "reduce")
    else:
        reduce = rates.collective(shard, width * parameters)
        if job.zero == 2:
            reduce *= job.microbatches
            backward *= job.microbatches
        reduce += rates.collective(replicas, width * parameters / shard.size, "reduce")
    gather = rates.collective(shard, 2.0 * parameters)
    return _exposed(reduce, backward, rates, first) + _exposed(gather, forward, rates, first)


def _exposed(seconds: float, compute: float, rates: Rates, least: float) -> float:
    hidden = min(seconds, compute)
    return max(seconds - hidden, min(least, seconds)) + rates.fit.contention * hidden


def _of_rank_kinds(job: Job, times: list[StageTime], rank: int) -> Parts:
    owner = placement(job.plan.schedule, job.plan.ranks, job.plan.chunks)
    mine = [time for time in times if owner[time.stage.number] == rank]
    return {kind: sum(time.seconds(kind) for time in mine) for kind in "FIW"}


def _optimizer(job: Job, rates: Rates, rank: int) -> float:
    """AdamW on this rank's share; on the host it is bound by the memory that a node's GPUs share, or by the copies of
    gradients there and weights back, which run beside it. Those of weights that are there are the layers' own."""
    shards = groups(job)["shard"].size if job.zero else 1
    share = job.rank_parameters(rank) / shards
    on_device = rates.memory(OPTIMIZER_BYTES * share * (1 - job.offload_optimizer))
    if not job.offload_optimizer:
        return on_device
    share, hardware = share * job.offload_optimizer, rates.hardware
    size = HOST_OPTIMIZER_BYTES + HOST_CLIPPING_BYTES * job.offload_weights
    host = size * share * min(hardware.node_gpus, job.layout.world_size) / hardware.host_memory_rate
    copies = 0.0 if job.offload_weights else rates.host(4.0 * share)  # fp32, each direction on its own
    return on_device + max(host, copies)
