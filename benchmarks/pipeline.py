"""Pipeline parallel 2 with 8 microbatches on a CPU: megasp's schedules beside megatron-core's 1F1B and one process.

    python -m benchmarks.pipeline [--sequence 1024] [--rounds 5]     # Llama 56M, fp32, one thread a rank
    python -m benchmarks.pipeline --predict [--sequence 1024]        # the simulator's step time, and the measured one
    python -m benchmarks.pipeline --replay                           # the same on 4 and 8 ranks that sleep

All train from the same weights on the same batches in turns (see contest.py). Losses of every step must agree to 1e-4.
One process has two threads, two ranks one each, so the machine is the same. The head's work makes the stages unequal;
megatron-core splits 4 + 4 layers, megasp by work.

With --predict the simulator gets the median time of each kind of action and stage. With --replay every action sleeps,
messages go the real way, and what is left is what executor and messages cost.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Contestant, play, ratio, record, table
from benchmarks.trainers import build_megasp, make_megasp_pipeline, make_megatron, microbatches
from benchmarks.workload import LLAMA_56M
from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import Config
from megasp.data import Batch
from megasp.local_ranks import run_ranks
from megasp.pipeline.executor import Pipeline
from megasp.pipeline.schedules import placement
from megasp.pipeline.simulate import simulate
from megasp.pipeline.trace import gather, makespan, median_cost, timed
from megasp.training.step import train_step

MICROBATCHES = 8
SCHEDULES = {"1f1b": 1, "interleaved": 2, "zb-h1": 1, "zbv": 2}


def configure(sequence: int, batch: int, schedule: str | None) -> Config:
    """Llama 56M with 8 microbatches; on two pipeline ranks with a schedule, else on one."""
    parallel = LLAMA_56M.parallel
    if schedule is not None:
        chunks = SCHEDULES[schedule] if SCHEDULES[schedule] > 1 else None
        parallel = dataclasses.replace(
            parallel,
            pipeline_model_parallel_size=2,
            pipeline_schedule=schedule,
            num_virtual_stages_per_pipeline_rank=chunks,
        )
    training = dataclasses.replace(
        LLAMA_56M.training, seq_length=sequence, micro_batch_size=batch, global_batch_size=batch * MICROBATCHES
    )
    return dataclasses.replace(LLAMA_56M, parallel=parallel, training=training)


def contest(sequence: int, batch: int, rounds: int, schedules: Sequence[str]) -> None:
    """megasp's schedules first: the table's ratios are to the first of them."""
    pairs = [
        Contestant(f"megasp {name}", make_megasp_pipeline, (configure(sequence, batch, name),), 2, 1)
        for name in schedules
    ]
    alone = configure(sequence, batch, None)
    others = [
        Contestant("megasp one process", make_megasp_pipeline, (alone,), 1, 2),
        Contestant("megatron-core 1F1B + SDPA", partial(make_megatron, pipeline=True), (alone, "fp32", True), 2, 1),
    ]
    outcomes = play([*pairs, *others], rounds, 1, check=same_loss)
    tokens = sequence * batch * MICROBATCHES
    print(f"## Pipeline parallel 2, {MICROBATCHES} microbatches of {batch} x {sequence} tokens, Llama 56M, fp32\n")
    print(table(outcomes, ("tokens", tokens)))
    by_name = {outcome.contestant.name: outcome for outcome in outcomes}
    for name in schedules:
        ours = by_name[f"megasp {name}"]
        peer, one = (ratio(by_name[other.name], ours).text() for other in reversed(others))
        print(f"{name}: {peer} x megatron-core's 1F1B, {one} x one process")
    print(json.dumps({"benchmark": "pipeline", "tokens": tokens, "contestants": record(outcomes)}))


def same_loss(losses: Mapping[str, float]) -> None:
    """Raise where a contestant's loss of a step is another than megasp's."""
    assert max(losses.values()) - min(losses.values()) <= 1e-4, losses


def predict(sequence: int, batch: int, steps: int) -> None:
    """Print predicted and measured times of a step's schedule on two ranks."""
    for name in SCHEDULES:
        found = run_ranks(_measure, 2, configure(sequence, batch, name), steps, timeout=600)[0]
        _say(name, 2, found)


def _measure(config: Config, steps: int) -> list[tuple[float, float]]:
    """(predicted, measured) seconds of each step but the first."""
    training = build_megasp(config, Layout(pp=2))
    return [
        _one(training.pipeline, lambda i=i: train_step(training, microbatches(config, i), 1e-3)) for i in range(steps)
    ][1:]


def _one(pipeline: Pipeline, step: Callable[[], Any]) -> tuple[float, float]:
    with timed(pipeline) as times:
        step()
    every = gather(pipeline, times)
    count = 1 + max(action.microbatch for action in every)
    return simulate(pipeline.schedule(count), median_cost(every)).makespan, makespan(every)


def _say(name: str, ranks: int, found: list[tuple[float, float]]) -> None:
    off = statistics.median(predicted / measured - 1 for predicted, measured in found)
    predicted, measured = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{name:12} {ranks} ranks  predicted {predicted:.3f} s  measured {measured:.3f} s  off by {off:+.1%}")


class _Sleep(torch.autograd.Function):
    """Takes `seconds` forward and twice that backward, or once while weight gradients are deferred."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: "_Stage") -> Tensor:
        ctx.stage = stage
        time.sleep(stage.seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(ctx.stage.seconds * (1 if ctx.stage.pipeline.weight_gradients.defers else 2))
        return dy, torch.zeros(1), None


class _Stage(nn.Module):
    """A stage that sleeps: what the executor asks of a model, and no more."""

    def __init__(self, seconds: float, last: bool) -> None:
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.ones(1)), seconds
        self.head: nn.Module | None = nn.Identity() if last else None
        self.pipeline: Pipeline

    def residual_shape(self, samples: int, positions: int) -> tuple[int, int, int]:
        return positions, samples, 512

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        x = x if x.is_floating_point() else torch.ones(self.residual_shape(*x.shape))
        out = _Sleep.apply(x, self.weight, self)
        return out.sum() if self.head is not None else out


def replay(steps: int) -> None:
    """Print predicted and measured times of schedules whose actions sleep for a known time."""
    for ranks in (4, 8):
        for name, chunks in SCHEDULES.items():
            _say(name, ranks, run_ranks(_replay, ranks, name, chunks, steps, timeout=300)[0])


def _replay(name: str, chunks: int, steps: int) -> list[tuple[float, float]]:
    import megasp.pipeline.executor as executor

    size = torch.distributed.get_world_size()
    state, seconds = parallel_state.build(Layout(pp=size), torch.device("cpu")), 0.06 / chunks
    # W of a stage that sleeps has no queue entries: it sleeps instead of computing them.
    executor.compute = lambda gradients: time.sleep(seconds)  # type: ignore[assignment]
    owner = placement(name, size, chunks)
    stages = {s: _Stage(seconds, s == len(owner) - 1) for s, rank in enumerate(owner) if rank == state.pp.rank}
    pipeline = Pipeline(PipelinePlan(name, size, chunks), stages, state, lambda last: None)  # type: ignore[arg-type]
    for stage in stages.values():
        stage.pipeline = pipeline
    batches: list[Batch] = microbatches(configure(256, 1, None), 0) * (2 * size // MICROBATCHES or 1)
    times = {"F": seconds, "B": 2 * seconds, "I": seconds, "W": seconds}
    found = []
    for _ in range(steps):
        with timed(pipeline) as measured:
            pipeline.train(batches, 1.0)
        expected = simulate(pipeline.schedule(len(batches)), lambda action: times[action.kind]).makespan
        found.append((expected, makespan(gather(pipeline, measured))))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2, help="samples of a microbatch")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--schedules", nargs="+", default=tuple(SCHEDULES), choices=tuple(SCHEDULES))
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--replay", action="store_true")
    args = parser.parse_args()
    if args.predict:
        predict(args.sequence, args.batch, args.rounds)
    elif args.replay:
        replay(args.rounds)
    else:
        contest(args.sequence, args.batch, args.rounds, args.schedules)


if __name__ == "__main__":
    main()
