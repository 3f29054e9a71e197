"""What really ran, per rank and action, beside what the simulator says, in the format of Chrome and Perfetto.

The simulator gets the times that the actions took (the median of each kind and stage), so a difference is what it does
not know: messages, and actions that took longer than usual.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasp import log
from megasp.collectives import all_reduce_
from megasp.pipeline.executor import Pipeline
from megasp.pipeline.schedules import Action, Schedule
from megasp.pipeline.simulate import Cost, Timeline, simulate

Times = dict[Action, dict[str, float]]
"""Action -> seconds at which it began to "wait", at which it "start"ed and at which it "end"ed."""


@contextlib.contextmanager
def recording(pipeline: Pipeline, file: str | None) -> Iterator[None]:
    """Time the actions of the training step inside and write them to `file`; without one do nothing.

    All ranks enter together. On a GPU every action is waited for, so this step is slower than others. One pipeline is
    written, that of rank 0.
    """
    if file is None:
        yield
        return
    with timed(pipeline) as times:
        yield
    every = gather(pipeline, times)
    if pipeline.state.rank == 0:
        schedule = pipeline.schedule(1 + max(action.microbatch for action in every))
        predicted = simulate(schedule, median_cost(every))
        took = makespan(every)
        log.info(
            f"trace of {took:.3f} s in {file}; the simulator says {predicted.makespan:.3f} s ({schedule.name}, bubble "
            f"{predicted.bubble:.1%}): open it in https://ui.perfetto.dev"
        )
        Path(file).write_text(json.dumps({"traceEvents": _events(schedule, every, predicted)}))


@contextlib.contextmanager
def timed(pipeline: Pipeline) -> Iterator[Times]:
    """Times of this rank's actions inside, counted from a moment at which all ranks of the pipeline were together."""
    device = pipeline.state.device
    times: Times = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def watch(event: str, action: Action) -> None:
        times.setdefault(action, {})[event] = now() - zero

    all_reduce_(torch.zeros(1, device=device), pipeline.state.pp)
    zero = now()
    before, pipeline.watch = pipeline.watch, watch
    try:
        yield times
    finally:
        pipeline.watch = before


def gather(pipeline: Pipeline, times: Times) -> Times:
    """The times of all ranks of this pipeline."""
    parts: list[Times] = [times] * pipeline.state.pp.size
    if pipeline.state.pp.size > 1:
        dist.all_gather_object(parts, times, group=pipeline.state.pp.group)
    return {action: at for part in parts for action, at in part.items()}


def makespan(times: Times) -> float:
    """From the first action's start to the last one's end."""
    return max(at["end"] for at in times.values()) - min(at["start"] for at in times.values())


def median_cost(times: Times) -> Cost:
    """A cost for the simulator: the median time of an action's kind and stage."""
    taken: dict[tuple[str, int], list[float]] = {}
    for action, at in times.items():
        taken.setdefault((action.kind, action.stage), []).append(at["end"] - at["start"])
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return lambda action: medians[action.kind, action.stage]


def _events(schedule: Schedule, times: Times, predicted: Timeline) -> list[dict[str, Any]]:
    """Chrome's trace events: process 0 is what ran, process 1 the simulation; a thread is a pipeline rank."""
    events: list[dict[str, Any]] = []
    for process, name in enumerate(("measured", "simulated")):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
            for rank in range(schedule.ranks)
        ]
    zero = min(at["start"] for at in times.values())
    for action, at in times.items():
        waited = {"waited_ms": round((at["start"] - at["wait"]) * 1e3, 3)}
        events.append(_event(0, schedule, action, (at["start"] - zero, at["end"] - zero), waited))
        events.append(_event(1, schedule, action, (predicted.start[action], predicted.end[action]), {}))
    return events


def _event(
    process: int, schedule: Schedule, action: Action, span: Sequence[float], more: dict[str, float]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": str(action),
        "cat": action.kind,
        "pid": process,
        "tid": schedule.owner[action.stage],
        "ts": span[0] * 1e6,
        "dur": (span[1] - span[0]) * 1e6,
        "args": {"stage": action.stage, "microbatch": action.microbatch} | more,
    }
