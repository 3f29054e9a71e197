"""A dry run of answers: the real build and step of some ranks on tensors without memory, beside the account and the
closed forms."""

import torch

from megasp import dry_run, log
from megasp.dry_run import Count
from megasp.planner.memory import shortened
from megasp.planner.search import Plan
from megasp.training.memory import COMPONENTS
from megasp.training.volumes import Volume


def table(plans: list[Plan]) -> list[str]:
    """Peak bytes, bytes sent and operations of the first, a middle and the last pipeline rank of each plan."""
    torch.set_num_threads(1)  # nothing is computed
    jobs = [(plan, rank) for plan in plans for rank in critical_ranks(plan)]
    counts = {(id(plan), rank): count(plan, rank) for plan, rank in log.progress(jobs, "dry run", len(jobs), "rank")}
    lines = []
    for plan in plans:
        found = {rank: counts[id(plan), rank] for rank in critical_ranks(plan)}
        lines += ["", f"dry run of {plan.layout.name}", *_memory(plan, found), *_volumes(plan, found)]
    return lines


LOOKED_AT = 0.85
"""Share of the account from which on a first step is looked at, for the component that holds it."""


def critical_ranks(plan: Plan) -> list[int]:
    """The first, a middle and the last pipeline rank."""
    return sorted({0, plan.layout.pp // 2, plan.layout.pp - 1})


def count(plan: Plan, rank: int) -> Count:
    """Of a pipeline rank, with as many microbatches as reach the peak."""
    layout = plan.layout
    place = dict.fromkeys(("dp_outer", "dp_inner", "ring", "ulysses", "tp"), 0) | {"pp": rank}
    # A first step of chunks is as any other: one sample, nothing of a microbatch before.
    steps = 1 if plan.config.activations.sequence_chunks > 1 else 2
    expected = LOOKED_AT * plan.memory[rank].allocated
    return dry_run.count(shortened(plan.config, layout), layout, layout.rank(place), steps, expected)


def _memory(plan: Plan, found: dict[int, Count]) -> list[str]:
    peaks = {rank: (counted.peak, plan.memory[rank].allocated) for rank, counted in found.items()}
    hosts = {rank: (counted.on_host, plan.memory[rank].host) for rank, counted in found.items()}
    lines = [f"  {'pipeline rank':42}" + "".join(f"{rank:16}" for rank in found)]
    for name, sizes in (("peak of what is allocated, GB", peaks), ("the same on the host, GB", hosts)):
        if any(counted for counted, _ in sizes.values()):
            lines.append(f"  {name:42}" + "".join(f"{counted / 1e9:16.2f}" for counted, _ in sizes.values()))
            cells = (f"{size / 1e9:9.2f} {size / max(counted, 1) - 1:+6.1%}" for counted, size in sizes.values())
            lines.append(f"  {'the account of it':42}" + "".join(cells))
    return lines + _components(plan, found)


def _components(plan: Plan, found: dict[int, Count]) -> list[str]:
    """What the peak is made of, counted, and by the account in brackets."""
    lines = ["  the peak by component, and in brackets the account's"]
    for name in COMPONENTS:
        pairs = [(found[rank].parts.get(name, 0), plan.memory[rank].parts.get(name, 0)) for rank in found]
        cells = "".join(f"{counted / 1e9:8.2f} {f'({size / 1e9:.2f})':>7}" for counted, size in pairs)
        lines += [f"    {name:40}{cells}"] if any(map(any, pairs)) else []
    return lines


def _volumes(plan: Plan, found: dict[int, Count]) -> list[str]:
    """Sums of 10^9 bytes sent and of 10^12 operations; `=` where the closed form says the same to the byte."""
    microbatches = plan.time.job.microbatches
    few = shortened(plan.config, plan.layout).num_microbatches(plan.layout)
    lines = [f"  sent in a step of {few} of the {microbatches} microbatches, GB ({'= as the closed form says'})"]
    for kind, unit in (("sent", 1e9), ("flops", 1e12)):
        if kind == "flops":
            lines.append("  operations of the same, TFLOP")
        names = dict.fromkeys(name for count in found.values() for name in sorted(getattr(count.volume, kind)))
        for name in names:
            words = name if isinstance(name, str) else f"{name[1].replace('_', '-')} over {name[0]}"
            cells = "".join(_cell(count.volume, count.formula, kind, name, unit) for count in found.values())
            lines.append(f"    {words:40}{cells}")
    return lines


def _cell(volume: Volume, formula: Volume, kind: str, name: object, unit: float) -> str:
    counted, said = getattr(volume, kind)[name], getattr(formula, kind)[name]
    beside = "=" if counted == said else f"{said / counted - 1:+.1%}" if said and counted else ""
    return f"{counted / unit:9.3f} {beside:6}"
