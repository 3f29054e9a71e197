"""The longest sequence that trains on given GPUs, and what gets there."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from megasp.planner.report import options
from megasp.planner.search import Plan, search
from megasp.planner.space import Request

STEP = 1024
"""Lengths are multiples of this times the GPUs, so that every split divides them."""

LARGEST = 1 << 17
"""Times that, beyond which nobody looks."""


@dataclass(frozen=True)
class Longest:
    """The fastest plans at two lengths, None where not even the shortest will do.

    Attributes:
        useful: the longest whose step ends in time.
        fits: the longest whose memory fits, however long its step takes.
    """

    useful: Plan | None
    fits: Plan | None


def report(request: Request, found: Longest, hours: float) -> list[str]:
    """The answer in words."""
    if found.fits is None:
        return [f"no sequence fits {request.gpus} x {request.hardware.name}: not even {_unit(request):,} tokens"]
    useful, fits = (_words(request, plan) if plan else [] for plan in (found.useful, found.fits))
    in_all = [f"by memory alone, however long a step takes: {fits[0]}", *fits[1:]]
    if found.useful is found.fits:
        return fits
    if not useful:
        return [f"no length has a step of {hours:g} hours: not even {_unit(request):,} tokens", *in_all]
    return [f"with a step of at most {hours:g} hours: {useful[0]}", *useful[1:], *in_all]


def _words(request: Request, plan: Plan) -> list[str]:
    time, tokens = plan.time, plan.config.training.seq_length
    node = max(rank.host for rank in plan.memory) * min(request.hardware.node_gpus, request.gpus)
    step = f"{time.seconds:.3g} s" if time.seconds < 3600 else f"{time.seconds / 3600:.1f} hours"
    return [
        f"{tokens:,} tokens on {request.gpus} x {request.hardware.name}: {plan.layout.name}, {options(plan)}",
        f"{plan.peak / 1e9:.1f} GB a GPU, {node / 1e9:,.0f} GB of a node's host; "
        f"{step} a step of {time.job.step_tokens:,} tokens, "
        f"{time.tokens_per_second_per_gpu:,.0f} tokens/s on each GPU",
    ]


def longest(request: Request, hours: float) -> Longest:
    """The longest lengths, one sample a step for each replica (or the batch given).

    Args:
        hours: that a step of a useful length takes at most.
    """
    at = cache(partial(best, request))

    def in_time(units: int) -> Plan | None:
        plan = at(units * _unit(request))
        return plan if plan is not None and plan.time.seconds <= 3600 * hours else None

    fits = _last(lambda units: at(units * _unit(request)))
    if fits is not None and fits.time.seconds <= 3600 * hours:
        return Longest(fits, fits)
    return Longest(_last(in_time), fits)


def _last(plan_of: Callable[[int], Plan | None]) -> Plan | None:
    """The plan of the largest number that has one, to half a percent."""
    found, low, high = None, 0, 1
    while (plan := plan_of(high)) is not None:  # doubled until there is none
        found, low, high = plan, high, 2 * high
        if high > LARGEST:
            break
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        plan = plan_of(middle)
        if plan is None:
            high = middle
        else:
            found, low = plan, middle
    return found


def _unit(request: Request) -> int:
    return STEP * request.gpus


def best(request: Request, seq_length: int) -> Plan | None:
    """The fastest plan at a length, if one fits."""
    config = request.config
    training = dataclasses.replace(
        config.training,
        seq_length=seq_length,
        micro_batch_size=1,
        global_batch_size=config.training.global_batch_size or 1,
    )
    model = dataclasses.replace(config.model, max_position_embeddings=None)
    if config.model.position_embedding_type == "learned_absolute":
        model = dataclasses.replace(config.model, max_position_embeddings=seq_length)
    changed = dataclasses.replace(config, training=training, model=model)
    found = search(dataclasses.replace(request, config=changed, given=request.given | {"micro_batch_size"}))
    return found.plans[0] if found.plans else None
