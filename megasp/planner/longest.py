"""The longest sequence that trains on given GPUs, and what gets there."""

import dataclasses

from megasp.planner.report import options
from megasp.planner.search import Plan, search
from megasp.planner.space import Request

STEP = 1024
"""Lengths are multiples of this times the GPUs, so that every split divides them."""


def report(request: Request, plan: Plan | None) -> list[str]:
    """The answer in words."""
    if plan is None:
        return [f"no sequence fits {request.gpus} x {request.hardware.name}: not even {_unit(request):,} tokens"]
    time, tokens = plan.time, plan.config.training.seq_length
    node = max(rank.host for rank in plan.memory) * min(request.hardware.node_gpus, request.gpus)
    return [
        f"{tokens:,} tokens on {request.gpus} x {request.hardware.name}: {plan.layout.name}, {options(plan)}",
        f"{plan.peak / 1e9:.1f} GB a GPU, {node / 1e9:,.0f} GB of a node's host; "
        f"{time.seconds:.3g} s a step of {time.job.step_tokens:,} tokens, "
        f"{time.tokens_per_second_per_gpu:,.0f} tokens/s on each GPU",
    ]


def longest(request: Request) -> Plan | None:
    """The fastest plan at the longest length that fits, one sample a step for each replica (or the batch given)."""
    unit = _unit(request)
    best, low = None, 0
    high = 1
    while (plan := _fits(request, high * unit)) is not None:  # doubled until it does not fit
        best, low, high = plan, high, 2 * high
        if high * unit > 1 << 28:
            break
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        plan = _fits(request, middle * unit)
        if plan is None:
            high = middle
        else:
            best, low = plan, middle
    return best


def _unit(request: Request) -> int:
    return STEP * request.gpus


def _fits(request: Request, seq_length: int) -> Plan | None:
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
