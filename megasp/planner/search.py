"""Finds the layouts that train fastest and fit.

    bound     for every combination of axes: compute and exposed communication of the layers alone, without bubbles,
              imbalance and gradients, which can only add to it; what cannot fit ends here.
    walk      axes from the lowest bound up; each with all schedules, microbatches, recompute and sharding, timed by
              closed forms: the fastest whose memory fits, by the account. Ends where a bound is above the best found.
    simulate  the pipelines of the best with the simulator that training's schedules are tested by.

One answer is kept for each combination of tensor, pipeline and context parallel sizes, so that ten answers are ten
different layouts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count, islice

from megasp.config.layout import Layout
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import Config
from megasp.config.stages import Stage, split
from megasp.errors import ConfigError
from megasp.model.memory import Sizes
from megasp.planner import space
from megasp.planner.job import Job
from megasp.planner.layer_time import layer_parts
from megasp.planner.memory import End, Floor, Memory, ends, memory, pipeline_ends
from megasp.planner.rates import Rates
from megasp.planner.space import MemoryOption, Request, Values
from megasp.planner.step_time import Microbatch, StepTime, least_seconds, quick_seconds, step_time
from megasp.training.memory import sizes_of

Key = tuple[tuple[str, object], ...]

AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ulysses_size", "ring_size", "cp_comm_type")

MARGIN = 1.05
"""Axes whose bound is so much above the best found are not looked into."""

SPLITS = 2
"""Ways to split a context-parallel size into Ulysses and ring that are looked into, those of the lowest bounds: bounds
count all that distinguishes them."""

ACCOUNTS = 40
"""Combinations of some axes that may fail by the account before the axes are given up."""

SHARDINGS = 3
"""Ways of sharding that are timed for a recompute: those that shard least of what may fit."""

SIMULATED = 16
"""Best answers whose pipelines are simulated, and whose memory is counted on every pipeline rank."""


@dataclass(frozen=True)
class Plan:
    """One answer."""

    values: Values
    config: Config
    layout: Layout
    time: StepTime
    memory: tuple[Memory, ...]

    @property
    def peak(self) -> float:
        """Bytes that the fullest GPU needs."""
        return max(rank.needed for rank in self.memory)


@dataclass
class Found:
    """What a search saw.

    Attributes:
        plans: the best first, one for each combination of axes.
        bounds: axes that were not looked into, with the least that their step takes and a job on them.
        illegal: axes that cannot run, with the rule's sentence.
        too_large: axes of which something does not fit, with the smallest of those, in
            bytes, and its values.
        host: least memory of a node's host that what fits the GPUs needs, where no host has it.
        tried: combinations that were timed; `accounts`: of those, whose memory was counted by the account.
        space: combinations of axes.
    """

    plans: list[Plan] = field(default_factory=list)
    bounds: dict[Key, tuple[float, Job]] = field(default_factory=dict)
    illegal: dict[Key, ConfigError] = field(default_factory=dict)
    too_large: dict[Key, tuple[float, Values]] = field(default_factory=dict)
    host: float = float("inf")
    tried: int = 0
    accounts: int = 0
    space: int = 0


def search(request: Request) -> Found:
    """The answers to a request, and why others are none; where nothing fits, with the host's memory."""
    found = _Search(request).run()
    if found.plans or request.host or not found.too_large:
        return found
    return _Search(replace(request, host=True)).run()


def axes_key(axes: Values) -> Key:
    """Axes in a form that can be looked up."""
    return tuple((name, axes[name]) for name in AXES if name in axes)


class _Search:
    """One search; jobs are made from the axes' own by what changes, and only what may win is validated again."""

    def __init__(self, request: Request) -> None:
        self.request, self.rates, self.found = request, Rates(request.hardware), Found()
        self._stages: dict[PipelinePlan, tuple[Stage, ...]] = {}
        self._ends: dict[object, tuple[End, ...]] = {}
        self._sizes: dict[object, tuple[Config, Sizes]] = {}
        self._floors: dict[object, Floor] = {}
        self._microbatches: dict[object, Microbatch] = {}

    def run(self) -> Found:
        found, bounded = self.found, []
        for axes in space.layouts(self.request):
            found.space += 1
            try:
                bound, job = self._bound(axes)
            except ConfigError as error:
                found.illegal[axes_key(axes)] = error
                continue
            if bound < float("inf"):
                bounded.append((bound, job, axes))
        bounded.sort(key=lambda item: item[0])
        looked: Counter[tuple[int, int, int]] = Counter()
        best = float("inf")
        for bound, job, axes in bounded:
            sizes = job.layout.tp, job.layout.pp, job.layout.cp
            if bound > MARGIN * best or looked[sizes] == SPLITS:
                found.bounds[axes_key(axes)] = bound, job
                continue
            looked[sizes] += 1
            plan = self._best(axes, job)
            if plan is not None:
                best = min(best, plan.time.seconds)
                found.plans.append(plan)
        found.plans = self._sharpened(found.plans)
        return found

    def _sharpened(self, plans: list[Plan]) -> list[Plan]:
        """The best of each combination of tensor, pipeline and context parallel sizes, their pipelines simulated."""
        best: dict[tuple[int, int, int], Plan] = {}
        for plan in sorted(plans, key=lambda plan: plan.time.seconds):
            best.setdefault((plan.layout.tp, plan.layout.pp, plan.layout.cp), plan)
        distinct = list(best.values())
        sharp = [
            replace(plan, time=step_time(plan.time.job, self.rates), memory=tuple(memory(plan.config, plan.layout)))
            for plan in distinct[:SIMULATED]
        ]
        return sorted(sharp, key=lambda plan: plan.time.seconds) + distinct[SIMULATED:]

    def _bound(self, axes: Values) -> tuple[float, Job]:
        """Seconds that a step takes at least, and a job on these axes.

        The recompute that memory asks for even with everything sharded and 1F1B's few live microbatches is counted.
        """
        request = self.request
        smallest = {"micro_batch_size": 1} if request.free("micro_batch_size") else {}
        job = Job.of(*request.legal(axes | smallest))
        options = space.memory_options(request, job.layout)
        sharding = max(option.thrift[1] for option in options)
        for option in options:
            values = axes | smallest | option.values
            if option.thrift[1] == sharding and self._fits_at_least(axes, values, job, option):
                break
        else:
            return float("inf"), job
        per_rank = request.config.model.num_layers / job.layout.pp
        again = option.applied(job)
        seconds = [
            choice.microbatches
            * per_rank
            * sum(sum(kind.values()) for kind in layer_parts(choice, self.rates).values())
            for choice, _ in self._micro_batches(again)
        ]
        return min(seconds, default=float("inf")), job

    def _micro_batches(self, job: Job) -> Iterator[tuple[Job, Values]]:
        samples = job.micro_batch * job.microbatches
        for choice in space.micro_batches(self.request, job.layout.dp):
            size = choice.get("micro_batch_size", job.micro_batch)
            yield replace(job, micro_batch=size, microbatches=samples // size), choice

    def _groups(self, axes: Values, job: Job) -> Iterator[tuple[Values, Job]]:
        """Schedules and microbatches of some axes."""
        for order in space.schedules(self.request, job.layout.pp):
            plan = job.plan
            if order:
                chunks = order.get("num_virtual_stages_per_pipeline_rank")
                plan = PipelinePlan.choose(order["pipeline_schedule"], job.layout.pp, chunks)
            if plan not in self._stages:
                self._stages[plan] = tuple(split(self.request.with_values(axes | order)))
            for choice, size in self._micro_batches(replace(job, plan=plan, stages=self._stages[plan])):
                if plan.schedule == "interleaved" and choice.microbatches % plan.ranks:
                    continue
                yield axes | order | size, choice

    def _time(self, job: Job) -> float:
        """Seconds of a step, about."""
        self.found.tried += 1
        return quick_seconds(job, self.rates, self._microbatch(job))

    def _least(self, job: Job) -> float:
        """Seconds that a job takes however it is sharded."""
        bare = replace(job, zero=0, offload_weights=False)
        return least_seconds(bare, self.rates, self._microbatch(bare))

    def _microbatch(self, job: Job) -> Microbatch:
        key = (
            job.layout,
            job.ring_mode,
            job.micro_batch,
            job.recompute,
            job.offload_activations,
            job.offload_attention,
            job.zero,
            job.offload_weights,
        )
        if key not in self._microbatches:
            self._microbatches[key] = Microbatch.of(job, self.rates)
        return self._microbatches[key]

    def _by_time(self, axes: Values, job: Job) -> Iterator[tuple[float, Values, Job, MemoryOption]]:
        """Every combination on these axes that its floor lets fit, the fastest first. How to shard a schedule,
        microbatch and recompute is looked at when no combination is left that is faster than these can be."""
        recomputes: dict[int, list[MemoryOption]] = {}
        for each in space.memory_options(self.request, job.layout):
            recomputes.setdefault(each.thrift[0], []).append(each)
        groups = list(self._groups(axes, job))
        queue: list[tuple[float, int, int, MemoryOption | None]] = [
            (self._least(options[0].applied(group)), place, again, None)
            for place, (_, group) in enumerate(groups)
            for again, options in recomputes.items()
        ]
        heapify(queue)
        order = count()
        while queue:
            seconds, place, again, option = heappop(queue)
            values, group = groups[place]
            if option is not None:
                yield seconds, values | option.values, group, option
                continue
            fitting = (each for each in recomputes[again] if self._fits_at_least(axes, values, group, each))
            for each in islice(fitting, SHARDINGS):
                heappush(queue, (self._time(each.applied(group)), place, len(recomputes) + next(order), each))

    def _best(self, axes: Values, job: Job) -> Plan | None:
        """The fastest combination on these axes that fits.

        Combinations are taken from the fastest on, until one fits by the account; one that saves no more than another
        of its schedule and microbatch that did not fit is passed over.
        """
        too_large: dict[tuple[PipelinePlan, int], list[tuple[int, int]]] = {}
        accounts = 0
        for seconds, values, group, option in self._by_time(axes, job):
            failed = too_large.setdefault((group.plan, group.micro_batch), [])
            if any(option.thrift[0] <= other[0] and option.thrift[1] <= other[1] for other in failed):
                continue
            ranks = self._memory(axes, values, option.layout)
            if ranks is None:
                failed.append(option.thrift)
                accounts += 1
                if accounts == ACCOUNTS:
                    return None
                continue
            try:
                config, layout = self.request.legal(values)
            except ConfigError:
                continue
            return Plan(values, config, layout, StepTime(Job.of(config, layout), seconds, {}, 0.0), ranks)
        return None

    def _fits_at_least(self, axes: Values, values: Values, job: Job, option: MemoryOption) -> bool:
        """Whether a GPU has what is needed at least; what cannot fit is noted."""
        shape = job.plan, job.layout.tp, job.microbatches
        size = job.layout, job.ring_mode, job.micro_batch, option.thrift[0]
        if (shape, size) not in self._floors:
            if shape not in self._ends:
                self._ends[shape] = pipeline_ends(self.request.with_values(values), job.layout)
            if size not in self._sizes:
                config = self.request.with_values(values | option.values)
                self._sizes[size] = config, sizes_of(config, job.layout, "cuda")
            self._floors[shape, size] = Floor.of(self._ends[shape], *self._sizes[size], job.microbatches)
        key = shape, size
        peak = self._floors[key].needed(option.layout, option.host)
        return self._noted(axes, values | option.values, peak) <= self.request.hardware.memory

    def _memory(self, axes: Values, values: Values, layout: Layout) -> tuple[Memory, ...] | None:
        """What the fullest pipeline ranks hold, where it fits; what does not is noted."""
        self.found.accounts += 1
        ranks = tuple(memory(self.request.with_values(values), layout, ends(layout)))
        peak = self._noted(axes, values, max(rank.needed for rank in ranks))
        hardware = self.request.hardware
        node = max(rank.host for rank in ranks) * min(hardware.node_gpus, layout.world_size)
        if peak > hardware.memory:
            return None
        if node > hardware.host_memory:
            self.found.host = min(self.found.host, node)
            return None
        return ranks

    def _noted(self, axes: Values, values: Values, peak: float) -> float:
        key = axes_key(axes)
        if peak > self.request.hardware.memory and peak < self.found.too_large.get(key, (float("inf"), {}))[0]:
            self.found.too_large[key] = peak, values
        return peak
