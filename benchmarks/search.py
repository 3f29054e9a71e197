"""What the planner's search misses: its best against the best of everything there is.

    python -m benchmarks.search                # every request; minutes each for many GPUs
    python -m benchmarks.search llama3-8b 8 8192 64

The closed form of a step is computed for every combination of axes, microbatch, recompute, schedule and sharding,
without bounds. Those up to `SLACK` above the search's best are counted by the account and simulated, the fastest first:
the best of them is the best there is, where closed form and simulation differ by no more than SLACK. The table has the
greatest difference that was seen; the floor of memory, which is asked before the account, is compared with it on a
sample.
"""

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megasp.config.load import from_values
from megasp.config.pipeline import PipelinePlan
from megasp.config.presets import PRESETS
from megasp.config.stages import split
from megasp.errors import ConfigError
from megasp.planner import space
from megasp.planner.hardware import load
from megasp.planner.job import Job
from megasp.planner.search import Found, Plan, _Search, search
from megasp.planner.space import Recompute, Request, Sharding, Values
from megasp.planner.step_time import Microbatch, PlainMicrobatch, quick_seconds, step_time

SLACK = 1.06

SAMPLE = 20
"""Combinations that do not fit by the floor whose account is counted, too."""

REQUESTS = (
    ("llama3-8b", 8, 4096, 256), ("llama3-8b", 8, 8192, 64), ("llama3-8b", 8, 32768, 16), ("llama3-8b", 8, 131072, 8),
    ("llama3-8b", 8, 1048576, 1), ("llama3-8b", 32, 8192, 512), ("llama3-8b", 32, 131072, 32),
    ("llama3-8b", 32, 1048576, 4), ("llama3-8b", 96, 8192, 768), ("llama3-8b", 256, 8192, 1024),
    ("llama3-70b", 8, 8192, 16), ("llama3-70b", 8, 32768, 4), ("llama3-70b", 8, 327680, 1),
    ("llama3-70b", 32, 8192, 256), ("llama3-70b", 64, 4096, 1024), ("llama3-70b", 64, 8192, 1024),
    ("llama3-70b", 64, 131072, 16), ("llama3-70b", 64, 524288, 4), ("llama3-70b", 256, 131072, 64),
    ("llama3-70b", 256, 1048576, 8), ("llama3-70b", 1024, 8192, 1024),
)  # fmt: skip
"""Preset, H100s, tokens of a sample, samples of a step."""


@dataclass(frozen=True)
class Combination:
    """One of everything there is, with the seconds of its closed form."""

    seconds: float
    axes: Values
    values: Values
    job: Job
    recompute: Recompute
    sharding: Sharding


@dataclass(frozen=True)
class Best:
    """The best there is.

    Attributes:
        seconds: of its simulated step.
        name: of its layout.
        combinations: that there are; `simulated`: that fit.
        difference: greatest share by which closed form and simulation differ.
    """

    seconds: float
    name: str
    combinations: int
    simulated: int
    difference: float


def request_of(preset: str, gpus: int, seq_length: int, batch: int, host: bool = False, **given: object) -> Request:
    """A request for H100s as `megasp plan` makes it."""
    base = {"bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0}
    shape = {"seq_length": seq_length, "global_batch_size": batch}
    config = from_values(PRESETS[preset] | base | shape | given)
    return Request(config, frozenset(given), gpus, load("h100-80"), host)


def everything(request: Request, tools: _Search) -> Iterator[Combination]:
    """Every combination that is legal but for its memory."""
    for axes in space.layouts(request):
        smallest = {"micro_batch_size": 1} if request.free("micro_batch_size") else {}
        try:
            job = Job.of(*request.legal(axes | smallest))
        except ConfigError:
            continue
        shardings = space.shardings(request, job.layout)
        samples = job.micro_batch * job.microbatches
        for size in space.micro_batches(request, job.layout.dp):
            micro = size.get("micro_batch_size", job.micro_batch)
            sized = replace(job, micro_batch=micro, microbatches=samples // micro)
            plain = PlainMicrobatch.of(sized, tools.rates)
            for order in space.schedules(request, job.layout.pp):
                plan = job.plan
                if order:
                    chunks = order.get("num_virtual_stages_per_pipeline_rank")
                    plan = PipelinePlan.choose(order["pipeline_schedule"], job.layout.pp, chunks)
                if plan.schedule == "interleaved" and sized.microbatches % plan.ranks:
                    continue
                values = axes | order | size
                ordered = replace(sized, plan=plan, stages=tuple(split(request.with_values(values))))
                for recompute in space.recomputes(request, job.layout):
                    again = recompute.applied(ordered)
                    for sharding in shardings:
                        this = sharding.applied(again)
                        seconds = quick_seconds(this, tools.rates, Microbatch.of(this, tools.rates, plain))
                        yield Combination(seconds, axes, values, this, recompute, sharding)


def best_of(request: Request, up_to: float) -> Best:
    """The best there is of what the closed forms put below some seconds.

    Raises:
        AssertionError: the floor of memory is above the account.
    """
    tools, kept, number = _Search(request, 1), [], 0
    for each in everything(request, tools):
        number += 1
        if each.seconds <= up_to:
            kept.append(each)
    kept.sort(key=lambda each: each.seconds)
    best, name, simulated, difference = float("inf"), "", 0, 0.0
    draw = random.Random(0)
    memory = request.hardware.memory
    for each in kept:
        if each.seconds > SLACK * best:
            break
        values = each.values | each.recompute.values | each.sharding.values
        if not tools._may_fit(each.axes, each.values, each.job, each.recompute, each.sharding):
            if draw.random() < SAMPLE / len(kept):
                ranks = tools._memory(each.axes, values, each.sharding.layout)
                assert max(rank.needed for rank in ranks) > memory, f"fits, the floor says it does not: {values}"
            continue
        ranks = tools._memory(each.axes, values, each.sharding.layout)
        if max(rank.needed for rank in ranks) > memory or not tools._host_holds(ranks, each.sharding.layout):
            continue
        try:
            config, layout = request.legal(values)
        except ConfigError:
            continue
        simulated += 1
        seconds = step_time(Job.of(config, layout), tools.rates).seconds
        difference = max(difference, abs(seconds / each.seconds - 1))
        if seconds < best:
            best, name = seconds, layout.name
    return Best(best, name, number, simulated, difference)


def compared(request: Request) -> tuple[Found, Plan, Best]:
    """The search, its best, and the best there is."""
    found = search(request)
    plan = found.plans[0]
    wide = replace(request, host=request.host or plan.config.offload.optimizer_cpu_offload)
    return found, plan, best_of(wide, SLACK * plan.time.seconds)


def main(requests: tuple[tuple[str, int, int, int], ...]) -> None:
    print(
        "| model, GPUs, tokens, batch | search: timed, accounts, CPU s | its best "
        "| all: combinations, simulated, CPU s | best of all | missed | closed form off by |\n"
        "|---|---|---|---|---|---|---|"
    )
    for preset, gpus, length, batch in requests:
        request = request_of(preset, gpus, length, batch)
        begun = time.process_time()
        search(request)
        searched = time.process_time() - begun
        found, plan, best = compared(request)
        everything_took = time.process_time() - begun - 2 * searched
        print(
            f"| {preset}, {gpus}, {length:,}, {batch} | {found.tried:,}, {found.accounts}, {searched:.1f} "
            f"| {plan.layout.name}, {plan.time.seconds:.4g} s | {best.combinations:,}, {best.simulated:,}, "
            f"{everything_took:.0f} | {best.name}, {best.seconds:.4g} s | {plan.time.seconds / best.seconds - 1:.2%} "
            f"| {best.difference:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    words = sys.argv[1:]
    main(((words[0], int(words[1]), int(words[2]), int(words[3])),) if words else REQUESTS)
