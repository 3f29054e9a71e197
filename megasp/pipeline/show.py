"""Draw a pipeline schedule; print its bubble, live activations and messages.

Times are in the papers' unit: forward, input gradient and weight gradient of a rank's layers take 1 each, unless flags
say otherwise. In the drawing F is forward, B backward, I and W its halves (input and weight gradients), lower case a
rank's second and later chunks.
"""

from dataclasses import dataclass
from pathlib import Path

from megasp.config.flags import flag
from megasp.config.pipeline import SCHEDULES, PipelinePlan
from megasp.errors import ConfigError
from megasp.pipeline import draw
from megasp.pipeline.schedules import Action, schedule
from megasp.pipeline.simulate import Timeline, simulate

DRAWN = 400
"""Most columns of actions that a terminal gets."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Schedule."""

    pipeline_model_parallel_size: int = flag(4, "ranks")
    num_microbatches: int = flag(8, "microbatches of a step")
    pipeline_schedule: str | None = flag(None, "order of work; 1f1b, or interleaved with chunks", choices=SCHEDULES)
    num_virtual_stages_per_pipeline_rank: int | None = flag(None, "chunks of each rank")
    forward_time: float = flag(1.0, "time of a forward of a rank's layers")
    input_gradient_time: float = flag(1.0, "time of the gradient of their input")
    weight_gradient_time: float = flag(1.0, "time of the gradients of their weights")
    message_time: float = flag(0.0, "time from one rank to the next")
    svg: str | None = flag(None, "write the drawing to this file", metavar="FILE")


def run(options: Options) -> int:
    """Run the command."""
    kinds = ("forward_time", "input_gradient_time", "weight_gradient_time")
    for name in ("pipeline_model_parallel_size", "num_microbatches", *kinds):
        if getattr(options, name) <= 0:
            got = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise ConfigError(got, "it must be positive", "give it a positive value")
    ranks, microbatches = options.pipeline_model_parallel_size, options.num_microbatches
    plan = PipelinePlan.choose(options.pipeline_schedule, ranks, options.num_virtual_stages_per_pipeline_rank)
    plan.check_microbatches(microbatches)
    forward, inputs, weights = (getattr(options, name) / plan.chunks for name in kinds)
    times = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights}

    def cost(action: Action) -> float:
        return times[action.kind]

    timeline = simulate(schedule(plan.schedule, ranks, microbatches, plan.chunks), cost, options.message_time)
    columns = timeline.makespan / min(time for kind, time in times.items() if kind in "FB")
    if columns <= DRAWN:
        print(draw.text(timeline))
    else:
        print(f"{columns:.0f} columns are too many for a terminal: use --svg FILE")
    print(describe(timeline, plan.chunks))
    if options.svg:
        Path(options.svg).write_text(draw.svg(timeline))
        print(f"drawing in {options.svg}")
    return 0


def describe(timeline: Timeline, chunks: int) -> str:
    """What a person compares schedules by."""
    schedule = timeline.schedule
    peaks = ", ".join(f"{peak / chunks:g}" for peak in timeline.peak)
    busy = [
        max(map(timeline.end.__getitem__, row)) - min(map(timeline.start.__getitem__, row)) for row in schedule.rows
    ]
    work = [sum(timeline.end[action] - timeline.start[action] for action in row) for row in schedule.rows]
    inner = max(1 - done / span for done, span in zip(work, busy, strict=True))
    return "\n".join(
        [
            f"{schedule.name}: {schedule.ranks} ranks, {chunks} chunk{'s' * (chunks > 1)} each, "
            f"{schedule.microbatches} microbatches",
            f"makespan           {timeline.makespan:g}",
            f"bubble             {timeline.bubble:.1%} of all ranks' time "
            f"(at most {inner:.1%} between a rank's own first and last action)",
            f"peak activations   {peaks} (by rank; 1 is one microbatch through a rank's layers)",
            f"messages           {timeline.messages} a step",
        ]
    )
