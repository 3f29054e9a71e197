"""What a person reads of a search: a table, why the rest is not in it, and one layout explained."""

from collections.abc import Iterator
from dataclasses import replace

from megasp.errors import ConfigError
from megasp.model.flops import flops_per_token
from megasp.planner import attention
from megasp.planner.job import Job
from megasp.planner.layer_time import COMPONENTS, groups
from megasp.planner.rates import Rates
from megasp.planner.search import Found, Plan
from megasp.planner.space import Request
from megasp.planner.step_time import StepTime, step_time

FLAGS = {
    "tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp", "ulysses_size": "u", "ring_size": "r",
}  # fmt: skip

WORDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, activations, loss",
    "overhead": "kernel starts and waits",
    "recompute": "recompute",
    "tensor": "tensor parallel communication",
    "ulysses": "Ulysses communication",
    "ring": "ring communication",
    "zero": "ZeRO-3 communication",
    "offload": "offload",
    "data": "gradient reduction",
    "optimizer": "optimizer",
    "imbalance": "waiting for the rank that has most",
    "pipeline": "pipeline bubble and messages",
}


def options(plan: Plan) -> str:
    """What an answer chooses beside its axes, in a few words."""
    values, job = plan.values, plan.time.job
    words = [f"micro-batch {job.micro_batch} x {job.microbatches}"]
    if job.plan.ranks > 1:
        words.append(job.plan.schedule + (f" x {job.plan.chunks}" if job.plan.schedule == "interleaved" else ""))
    if job.layout.ring > 1:
        words.append(job.ring_mode)
    recompute = values.get("recompute_granularity", plan.config.activations.recompute_granularity)
    words.append(f"recompute {recompute}" if recompute else "no recompute")
    activations = plan.config.activations
    words += [f"MLP in {activations.tiled_mlp} tiles"] * (activations.tiled_mlp > 1)
    words += [f"sequence in {activations.sequence_chunks} chunks"] * (activations.sequence_chunks > 1)
    words += [f"one input of {activations.recompute_num_layers} layers"] * ((activations.recompute_num_layers or 1) > 1)
    words += ["activations on the host"] * activations.cpu_offloading_activations
    host = plan.config.offload
    words += ["optimizer on the host"] * (host.optimizer_cpu_offload and not host.cpu_offloading_weights)
    words += ["weights and optimizer on the host"] * host.cpu_offloading_weights
    return ", ".join(words)


def mfu(plan: Plan, request: Request) -> float:
    """Share of the datasheet's rate, causal attention counted half."""
    flops = flops_per_token(plan.config.model, plan.config.training.seq_length)
    return plan.time.tokens_per_second_per_gpu * flops / request.hardware.peak["bf16"]


def table(found: Found, request: Request, top: int) -> list[str]:
    """The best answers, a line each."""
    plans = found.plans[:top]
    width = max([6, *(len(plan.layout.name) for plan in plans)])
    lines = [f"    {'layout':{width}}  s/step  tokens/s/GPU    MFU  bubble  GB/GPU  beside"]
    for place, plan in enumerate(plans, 1):
        time = plan.time
        lines.append(
            f"{place:2}  {plan.layout.name:{width}}  {time.seconds:6.4g}  {time.tokens_per_second_per_gpu:12,.0f}  "
            f"{mfu(plan, request):5.1%}  {time.bubble:6.1%}  {plan.peak / 1e9:6.1f}  {options(plan)}"
        )
    return [*lines, *attention.compared(plans[0].time, plans[0].config, request.hardware)]


def rejections(found: Found, request: Request) -> Iterator[str]:
    """For every size of every axis that is not in the best answer: what it costs, or why it cannot be."""
    if not found.plans:
        return
    best = found.plans[0]
    chosen = {name: best.values.get(name) for name in FLAGS}
    for name, short in FLAGS.items():
        for value in sorted({dict(key)[name] for key in _keys(found)}, key=str):
            if value != chosen[name]:
                yield f"{short}{value}: {_reason(found, request, best, name, value)}"


def _keys(found: Found) -> Iterator[tuple[tuple[str, object], ...]]:
    yield from found.illegal
    yield from found.bounds
    yield from found.too_large
    for plan in found.plans:
        yield tuple((name, plan.values[name]) for name in FLAGS)


def _reason(found: Found, request: Request, best: Plan, name: str, value: object) -> str:
    has = (name, value)
    plan = next((plan for plan in found.plans if plan.values.get(name) == value), None)
    if plan is not None:
        return slower(timed(plan, request), best, request)
    errors = [error for key, error in found.illegal.items() if has in key]
    for bound, values in sorted((item for key, item in found.bounds.items() if has in key), key=lambda item: item[0]):
        try:
            job = Job.of(*request.legal(values))
        except ConfigError as error:
            errors.append(error)
            continue
        return slower(step_time(job, Rates(request.hardware)), best, request, bound)
    large = [peak for key, (peak, _) in found.too_large.items() if has in key]
    if large:
        return f"does not fit: {min(large) / 1e9:.0f} GB at least on a GPU of {request.hardware.memory / 1e9:.0f}"
    return f"cannot be: {errors[0].got}: {errors[0].rule}" if errors else "not looked into"


def timed(plan: Plan, request: Request) -> StepTime:
    """Its time by components; answers far down the list have only a sum."""
    return plan.time if plan.time.parts else step_time(plan.time.job, Rates(request.hardware))


def slower(time: StepTime, best: Plan, request: Request, at_least: float | None = None) -> str:
    """By how much, and what takes most of it.

    Args:
        at_least: seconds, where the time is but one of something of which no less is known.
    """
    work = time.job.step_tokens / best.time.job.step_tokens
    more = {name: time.parts.get(name, 0.0) / work - best.time.parts.get(name, 0.0) for name in COMPONENTS}
    worst = max(more, key=lambda name: more[name])
    words = f"{(at_least or time.seconds / work) / best.time.seconds - 1:+.1%}{' or more' * (at_least is not None)}"
    words += f" as {time.job.layout.name}"
    if more[worst] <= 0:
        return words
    return words + f", {more[worst]:.2g} s more of {WORDS[worst]}{_where(time.job, worst, request)}"


def _where(job: Job, component: str, request: Request) -> str:
    """The link that a component's communication crosses."""
    axis = {"tensor": "tp", "ulysses": "ulysses", "ring": "ring", "zero": "shard", "data": "shard"}.get(component)
    if axis is None:
        return ""
    group = groups(job)[axis]
    if not group.crosses(request.hardware):
        return " inside the node"
    size = 2.0 * job.tokens * job.model.hidden_size
    return f" between nodes at {Rates(request.hardware).bus_rate(group, size) / 1e9:.0f} GB/s"


def explain(plan: Plan, request: Request, found: Found) -> list[str]:
    """Time by component, memory by component and rank, and what would have to change."""
    time, job = plan.time, plan.time.job
    lines = [
        f"{plan.layout.name}: {plan.layout.describe()}",
        f"{options(plan)}; {time.seconds:.4g} s a step of {job.step_tokens:,} tokens, "
        f"{time.tokens_per_second_per_gpu:,.0f} tokens/s on each GPU, MFU {mfu(plan, request):.1%}",
        "",
        "time, mean of the pipeline's ranks",
    ]
    for name in COMPONENTS:
        seconds = time.parts.get(name, 0.0)
        if seconds > 5e-4 * time.seconds:
            bar = "#" * round(40 * seconds / time.seconds)
            lines.append(f"  {WORDS[name]:30} {seconds:9.3f} s {seconds / time.seconds:6.1%}  {bar}")
    lines += ["", f"memory, GB of {request.hardware.memory / 1e9:.0f}", *memory_lines(plan), ""]
    return [*lines, *_compiled(plan, request), *_changes(plan, request, found)]


def _compiled(plan: Plan, request: Request) -> list[str]:
    """What the option that no layout excludes would gain."""
    job = plan.time.job
    if job.software.fused:
        return []
    fused = replace(job, software=replace(job.software, fused=True))
    seconds = step_time(fused, Rates(request.hardware)).seconds
    return [f"With --compile {seconds:.4g} s a step ({seconds / plan.time.seconds - 1:+.1%})."]


def memory_lines(plan: Plan) -> list[str]:
    """A column for each pipeline rank, of many the first, a middle and the last."""
    ranks = plan.memory
    shown = ranks if len(ranks) <= 6 else (ranks[0], ranks[len(ranks) // 2], ranks[-1])
    names = list(dict.fromkeys(name for rank in shown for name in rank.parts))
    lines = [f"  {'pipeline rank':30}" + "".join(f"{rank.rank:9}" for rank in shown)]
    for name in names:
        lines.append(f"  {name:30}" + "".join(f"{rank.parts.get(name, 0.0) / 1e9:9.2f}" for rank in shown))
    lines.append(f"  {'needed, with what is outside':30}" + "".join(f"{rank.needed / 1e9:9.2f}" for rank in shown))
    return lines


def _changes(plan: Plan, request: Request, found: Found) -> list[str]:
    best = found.plans[0] if found.plans else plan
    if best.layout == plan.layout:
        return ["This is the best layout found."] + [f"  {line}" for line in rejections(found, request)]
    fits = plan.peak <= request.hardware.memory
    lines = [] if fits else [f"It does not fit: {plan.peak / 1e9:.1f} GB."]
    return [*lines, f"Against the best: {slower(timed(plan, request), best, request)}."]
