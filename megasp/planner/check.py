"""A dry run of answers: the real build and step of some ranks on tensors without memory, beside the account."""

import torch

from megasp import dry_run, log
from megasp.planner.memory import Memory, shortened
from megasp.planner.search import Plan


def table(plans: list[Plan]) -> list[str]:
    """Peak bytes of the first, a middle and the last pipeline rank, by account and as counted."""
    torch.set_num_threads(1)  # nothing is computed
    jobs = [(plan, rank) for plan in plans for rank in sorted({0, plan.layout.pp // 2, plan.layout.pp - 1})]
    lines = [
        "dry run: peak of what is allocated, GB",
        f"    {'layout':34} {'pipeline rank':>13} {'account':>9} {'counted':>9}",
    ]
    for plan, rank in log.progress(jobs, "dry run", len(jobs), unit="rank"):
        account, counted = plan.memory[rank], _counted(plan, plan.memory[rank])
        error = account.allocated / counted - 1
        lines.append(
            f"    {plan.layout.name:34} {rank:13} {account.allocated / 1e9:9.2f} {counted / 1e9:9.2f}  {error:+.1%}"
        )
    return lines


def _counted(plan: Plan, memory: Memory) -> int:
    """With as many microbatches as reach the peak."""
    layout = plan.layout
    place = dict.fromkeys(("dp_outer", "dp_inner", "ring", "ulysses", "tp"), 0) | {"pp": memory.rank}
    return dry_run.count(shortened(plan.config, layout), layout, layout.rank(place)).peak
