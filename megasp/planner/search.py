"""Finds the layouts that train fastest and fit, by best-first branch and bound.

What is chosen step by step narrows, and each step has a bound: the least seconds of everything that is left below it.

    axes        the layers' compute and exposed communication alone
    microbatch  the same, with the time of a recompute
    schedule    the pipeline's closed form: bubble, head, imbalance
    sharding    all of the step's closed form; only here the account of memory is asked

The least bound is always looked into next, so an answer is found before anything slower is looked at, nothing faster is
passed over, and what the closed forms put within `CLOSE` of the best is simulated by the simulator that training's
schedules are tested by. (`benchmarks/search.py` compares this with everything there is.)

One answer is kept for each combination of tensor, pipeline and context parallel sizes, so that ten answers are ten
different layouts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush

from megasp.config.layout import Layout
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import Config
from megasp.config.stages import Stage, split
from megasp.errors import ConfigError
from megasp.model.memory import Sizes
from megasp.planner import space
from megasp.planner.job import Job
from megasp.planner.memory import End, Floor, Memory, ends, memory, pipeline_ends
from megasp.planner.rates import Rates
from megasp.planner.space import Recompute, Request, Sharding, Values
from megasp.planner.step_time import Microbatch, PlainMicrobatch, StepTime, least_seconds, quick_seconds, step_time
from megasp.training.memory import sizes_of

Key = tuple[tuple[str, object], ...]

AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ulysses_size", "ring_size", "cp_comm_type")

ANSWERS = 10
"""So many different answers are looked for."""

MARGIN = 1.3
"""Where fewer have been found, slower ones are looked for up to so many times the best."""

CLOSE = 1.03
"""All that the closed forms put within this of the best is simulated: they may be so much off the simulation."""


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
        bounds: axes with something that was not looked into: the least that its step takes, and its values.
        illegal: axes that cannot run, with the rule's sentence, as far as they were looked into.
        too_large: axes of which something does not fit, with the smallest of those, in
            bytes, and its values.
        host: least memory of a node's host that what fits the GPUs needs, where no host has it.
        tried: combinations that were timed; `accounts`: of those, whose memory was counted by the account.
        space: combinations of axes.
    """

    plans: list[Plan] = field(default_factory=list)
    bounds: dict[Key, tuple[float, Values]] = field(default_factory=dict)
    illegal: dict[Key, ConfigError] = field(default_factory=dict)
    too_large: dict[Key, tuple[float, Values]] = field(default_factory=dict)
    host: float = float("inf")
    tried: int = 0
    accounts: int = 0
    space: int = 0


def search(request: Request, answers: int = ANSWERS) -> Found:
    """The answers to a request, and why others are none; where nothing fits, with the host's memory."""
    found = _Search(request, answers).run()
    if found.plans or request.host or not found.too_large:
        return found
    return _Search(replace(request, host=True), answers).run()


def axes_key(axes: Values) -> Key:
    """Axes in a form that can be looked up."""
    return tuple((name, axes[name]) for name in AXES if name in axes)


def _sizes(axes: Values) -> tuple[int, int, int]:
    tp, pp, ulysses, ring = (axes[name] for name in AXES[:4])
    return tp, pp, ulysses * ring


@dataclass(frozen=True, order=True)
class _Branch:
    """Part of the space.

    Attributes:
        seconds: the least that a step takes in it.
        order: of making, among equals.
        axes: its own; `values`: with what else is chosen by now.
        grow: yields its parts; the last ones yield nothing and may be an answer.
    """

    seconds: float
    order: int
    axes: Values = field(compare=False)
    values: Values = field(compare=False)
    grow: Callable[[], "Iterator[_Part]"] = field(compare=False)


_Part = tuple[float, Values, "Callable[[], Iterator[_Part]]"]
"""Seconds at least, what is chosen, and how it grows."""


class _Search:
    """One search; jobs are made from the axes' own by what changes, and only what may win is validated again."""

    def __init__(self, request: Request, answers: int) -> None:
        self.request, self.answers, self.rates, self.found = request, answers, Rates(request.hardware), Found()
        self._queue: list[_Branch] = []
        self._grown = 0
        self._best = float("inf")
        self._plans: defaultdict[tuple[int, int, int], list[Plan]] = defaultdict(list)
        self._failed: defaultdict[object, list[tuple[int, ...]]] = defaultdict(list)
        self._stages: dict[PipelinePlan, tuple[Stage, ...]] = {}
        self._ends: dict[object, tuple[End, ...]] = {}
        self._sizes: dict[object, tuple[Config, Sizes]] = {}
        self._floors: dict[object, Floor] = {}
        self._plain: dict[object, PlainMicrobatch] = {}
        self._microbatches: dict[object, Microbatch] = {}

    def run(self) -> Found:
        found = self.found
        self._plant()
        while self._queue and self._queue[0].seconds <= self._limit():
            branch = heappop(self._queue)
            if branch.seconds > self._limit(_sizes(branch.axes)):
                self._leave(branch)
                continue
            for part in branch.grow():
                self._push(branch.axes, *part)
        for branch in self._queue:
            self._leave(branch)
        found.plans = self._sharpened()
        return found

    def _limit(self, sizes: tuple[int, int, int] | None = None) -> float:
        """Seconds up to which anything is looked into, or what has these sizes."""
        if sizes in self._plans or len(self._plans) >= self.answers:
            return CLOSE * self._best
        return MARGIN * self._best

    def _push(self, axes: Values, seconds: float, values: Values, grow: Callable[[], Iterator[_Part]]) -> None:
        self._grown += 1
        heappush(self._queue, _Branch(seconds, self._grown, axes, values, grow))

    def _leave(self, branch: _Branch) -> None:
        key = axes_key(branch.axes)
        if branch.seconds < self.found.bounds.get(key, (float("inf"),))[0]:
            self.found.bounds[key] = branch.seconds, branch.values

    def _sharpened(self) -> list[Plan]:
        """The best of each combination of sizes, simulated, with the memory of every pipeline rank."""
        best = []
        for plans in self._plans.values():
            sharp = [replace(plan, time=step_time(plan.time.job, self.rates)) for plan in plans]
            plan = min(sharp, key=lambda plan: plan.time.seconds)
            best.append(replace(plan, memory=tuple(memory(plan.config, plan.layout))))
        return sorted(best, key=lambda plan: plan.time.seconds)

    def _plant(self) -> None:
        """Every combination of axes, with the time of its layers alone. Which are legal is seen where they are looked
        into: the first that is shows what all have in common."""
        some: Job | None = None
        for axes in space.layouts(self.request):
            self.found.space += 1
            if some is None:
                try:
                    some = Job.of(*self.request.legal(axes | self._smallest))
                except ConfigError as error:
                    self.found.illegal[axes_key(axes)] = error
                    continue
            tp, pp, ulysses, ring = (axes[name] for name in AXES[:4])
            dp = self.request.gpus // (tp * pp * ulysses * ring)
            layout = Layout(tp=tp, pp=pp, ulysses=ulysses, ring=ring, dp_inner=dp)
            job = replace(
                some,
                layout=layout,
                sequence_parallel=axes.get("sequence_parallel", some.sequence_parallel),
                ring_mode=axes.get("cp_comm_type", some.ring_mode),
            )
            layers = job.model.num_layers / pp
            bounds = [
                (choice.microbatches * layers * self._common(choice).layer.seconds, size)
                for choice, size in self._micro_batches(job)
            ]
            bound, size = min(bounds, key=lambda each: each[0], default=(0.0, self._smallest))
            self._push(axes, bound, axes | size, partial(self._of_axes, axes))

    @property
    def _smallest(self) -> Values:
        return {"micro_batch_size": 1} if self.request.free("micro_batch_size") else {}

    def _of_axes(self, axes: Values) -> Iterator[_Part]:
        """Microbatches and recomputes."""
        try:
            job = Job.of(*self.request.legal(axes | self._smallest))
        except ConfigError as error:
            self.found.illegal[axes_key(axes)] = error
            return
        layers = job.model.num_layers / job.layout.pp
        shardings = space.shardings(self.request, job.layout)
        for recompute in space.recomputes(self.request, job.layout):
            for choice, size in self._micro_batches(recompute.applied(job)):
                seconds = choice.microbatches * layers * sum(self._microbatch(choice).layer)
                grow = partial(self._of_microbatch, axes, axes | size, choice, recompute, shardings)
                yield seconds, axes | size | recompute.values, grow

    def _of_microbatch(
        self, axes: Values, values: Values, job: Job, recompute: Recompute, shardings: list[Sharding]
    ) -> Iterator[_Part]:
        """Schedules."""
        if not any(self._may_fit(axes, values, job, recompute, each) for each in shardings):
            return
        for order in space.schedules(self.request, job.layout.pp):
            plan = job.plan
            if order:
                chunks = order.get("num_virtual_stages_per_pipeline_rank")
                plan = PipelinePlan.choose(order["pipeline_schedule"], job.layout.pp, chunks)
            if plan.schedule == "interleaved" and job.microbatches % plan.ranks:
                continue
            if plan not in self._stages:
                self._stages[plan] = tuple(split(self.request.with_values(values | order)))
            this = replace(job, plan=plan, stages=self._stages[plan])
            seconds = least_seconds(this, self.rates, self._microbatch(this))
            grow = partial(self._of_schedule, axes, values | order, this, recompute, shardings)
            yield seconds, values | order | recompute.values, grow

    def _of_schedule(
        self, axes: Values, values: Values, job: Job, recompute: Recompute, shardings: list[Sharding]
    ) -> Iterator[_Part]:
        """Shardings."""
        for sharding in shardings:
            this = sharding.applied(job)
            self.found.tried += 1
            seconds = quick_seconds(this, self.rates, self._microbatch(this))
            grow = partial(self._answer, seconds, axes, values, this, recompute, sharding)
            yield seconds, values | recompute.values | sharding.values, grow

    def _answer(
        self, seconds: float, axes: Values, values: Values, job: Job, recompute: Recompute, sharding: Sharding
    ) -> Iterator[_Part]:
        """An answer where it fits and is legal. What saves no more than another of its schedule that did not fit, with
        microbatches no smaller, does not fit either."""
        yield from ()
        failed = self._failed[axes_key(axes), job.plan]
        saves = -job.micro_batch, *recompute.saves, *sharding.saves
        if any(all(mine <= its for mine, its in zip(saves, other, strict=True)) for other in failed):
            return
        if not self._may_fit(axes, values, job, recompute, sharding):
            return
        values = values | recompute.values | sharding.values
        ranks = self._memory(axes, values, sharding.layout)
        if max(rank.needed for rank in ranks) > self.request.hardware.memory:
            failed.append(saves)
            return
        if not self._host_holds(ranks, sharding.layout):
            return
        try:
            config, layout = self.request.legal(values)
        except ConfigError:
            return
        self._best = min(self._best, seconds)
        self._plans[_sizes(axes)].append(
            Plan(values, config, layout, StepTime(Job.of(config, layout), seconds, {}, 0.0), ranks)
        )

    def _micro_batches(self, job: Job) -> Iterator[tuple[Job, Values]]:
        samples = (self.request.config.training.global_batch_size or job.layout.dp) // job.layout.dp
        for choice in space.micro_batches(self.request, job.layout.dp):
            size = choice.get("micro_batch_size", job.micro_batch)
            yield replace(job, micro_batch=size, microbatches=samples // size), choice

    def _common(self, job: Job) -> PlainMicrobatch:
        layout = job.layout
        key = layout.tp, layout.ulysses, layout.ring, job.ring_mode, job.micro_batch
        if key not in self._plain:
            self._plain[key] = PlainMicrobatch.of(job, self.rates)
        return self._plain[key]

    def _microbatch(self, job: Job) -> Microbatch:
        gathers = job.zero == 3 and (job.layout, job.offload_weights)
        common = self._common(job)
        key = id(common), job.recompute, job.offload_activations, job.offload_attention, gathers
        if key not in self._microbatches:
            self._microbatches[key] = Microbatch.of(job, self.rates, common)
        return self._microbatches[key]

    def _may_fit(self, axes: Values, values: Values, job: Job, recompute: Recompute, sharding: Sharding) -> bool:
        """Whether a GPU has what is needed at least; what cannot fit is noted."""
        shape = job.plan, job.layout.tp, job.microbatches
        size = job.layout.tp, job.layout.ulysses, job.layout.ring, job.ring_mode, job.micro_batch, recompute.saves
        if (shape, size) not in self._floors:
            if shape not in self._ends:
                self._ends[shape] = pipeline_ends(self.request.with_values(values), job.layout)
            if size not in self._sizes:
                config = self.request.with_values(values | recompute.values)
                self._sizes[size] = config, sizes_of(config, job.layout, "cuda")
            self._floors[shape, size] = Floor.of(self._ends[shape], *self._sizes[size], job.microbatches)
        peak = self._floors[shape, size].needed(sharding.layout, sharding.host)
        return self._noted(axes, values | recompute.values | sharding.values, peak) <= self.request.hardware.memory

    def _memory(self, axes: Values, values: Values, layout: Layout) -> tuple[Memory, ...]:
        """What the fullest pipeline ranks hold; what does not fit is noted."""
        self.found.accounts += 1
        ranks = tuple(memory(self.request.with_values(values), layout, ends(layout)))
        self._noted(axes, values, max(rank.needed for rank in ranks))
        return ranks

    def _host_holds(self, ranks: tuple[Memory, ...], layout: Layout) -> bool:
        """Whether a node's host has room for what its GPUs keep there; what it lacks is noted."""
        hardware = self.request.hardware
        node = max(rank.host for rank in ranks) * min(hardware.node_gpus, layout.world_size)
        if node > hardware.host_memory:
            self.found.host = min(self.found.host, node)
        return node <= hardware.host_memory

    def _noted(self, axes: Values, values: Values, peak: float) -> float:
        key = axes_key(axes)
        if peak > self.request.hardware.memory and peak < self.found.too_large.get(key, (float("inf"), {}))[0]:
            self.found.too_large[key] = peak, values
        return peak
