"""The longest sequences that train, against published ones, each confirmed by a dry run of the real build and step.

    python -m benchmarks.longest                                   # every row, three lengths each: hours of one core
    python -m benchmarks.longest --only llama3-8b,1,h100-80 --lengths aim

For each model and number of GPUs of `benchmarks/data/max_sequence_lengths.csv` that is named in `ROWS`, three lengths:
`aim`, 1.5 times the published; `useful`, the longest whose step ends in --max-step-hours; `memory`, the longest that
fits. For each the fastest plan, its step and rate by the time model, and what a dry run counts on its first, a middle
and the last pipeline rank beside the account: bytes of the GPU and of the host, and whether the bytes sent and the
operations are those of the closed forms.
"""

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megasp.config import load
from megasp.planner import check, hardware, longest
from megasp.planner.plan import DEFAULTS, PlanOptions
from megasp.planner.report import options
from megasp.planner.search import Plan
from megasp.planner.space import CHUNK, Request

PUBLISHED = Path(__file__).parent / "data" / "max_sequence_lengths.csv"
FACTOR = 1.5
"""Times the published length: the aim."""


@dataclass(frozen=True)
class Row:
    """A model on some GPUs, and the published result to compare with (system and model of the file), or a length."""

    model: str
    gpus: int
    gpu: str
    system: str = ""
    name: str = ""
    length: int = 0

    @property
    def aim(self) -> int:
        """Tokens, in whole chunks of every GPU."""
        if self.length:
            return self.length
        with PUBLISHED.open() as file:
            found = [
                int(each["max_seq_len"])
                for each in csv.DictReader(file)
                if (each["system"], each["model"], int(each["gpus"])) == (self.system, self.name, self.gpus)
                and each["gpu_type"].lower() == self.gpu
            ]
        unit = CHUNK * self.gpus
        return -(-int(FACTOR * max(found)) // unit) * unit


LENGTHS = ["aim", "useful", "memory"]
ALST, FPDT = "ALST", "FPDT (Ulysses-Offload)"
ROWS = [
    *(Row("llama3-8b", gpus, "h100-80", ALST, "Llama-3.1-8B") for gpus in (1, 8, 32)),
    *(Row("llama3-70b", gpus, "h100-80", ALST, "Llama-3.1-70B") for gpus in (8, 16, 32)),
    Row("llama3-8b", 8, "a100-80", FPDT, "Llama3-8B"),
    Row("llama3-70b", 4, "h100-80", length=524_288),
    Row("llama3-70b", 8, "h100-80", length=1_048_576),
]


def request(row: Row) -> Request:
    """What is asked of the planner."""
    flags = load.parser("longest", "", (PlanOptions,))
    config, *_ = load.load(["--model", row.model], flags, PlanOptions, DEFAULTS)
    return Request(config, frozenset(), row.gpus, hardware.load(row.gpu))


def plans(row: Row, wanted: list[str], hours: float) -> dict[str, Plan | None]:
    """The fastest at each length."""
    asked = request(row)
    found: dict[str, Plan | None] = {}
    if "aim" in wanted:
        found["aim"] = longest.best(asked, row.aim)
    if {"useful", "memory"} & set(wanted):
        both = longest.longest(asked, hours)
        found |= {name: plan for name, plan in (("useful", both.useful), ("memory", both.fits)) if name in wanted}
    return found


def show(row: Row, name: str, plan: Plan | None, counted: bool) -> None:
    """One length of a row."""
    if plan is None:
        print(f"{row.model}, {row.gpus} {row.gpu}, {name}: {row.aim:,} tokens fit nowhere", flush=True)
        return
    took = plan.time
    print(
        f"{row.model}, {row.gpus} {row.gpu}, {name}: {plan.config.training.seq_length:,} tokens, "
        f"{took.seconds / 3600:.2f} h a step, {took.tokens_per_second_per_gpu:.1f} tokens/s/GPU; "
        f"{plan.layout.name}, {options(plan)}",
        flush=True,
    )
    for rank in check.critical_ranks(plan) if counted else ():
        begun = time.process_time()
        found, account = check.count(plan, rank), plan.memory[rank]
        host = f"host {found.on_host / 1e9:.2f} ({account.host / max(found.on_host, 1) - 1:+.1%}), "
        volume, formula = found.volume, found.formula
        off = {
            name: f"{formula.sent[name] / size - 1:+.1%}"
            for name, size in volume.sent.items()
            if size != formula.sent[name] and name[1] != "all_reduce"
        } | {name: "" for name, size in volume.flops.items() if size != formula.flops[name]}
        print(
            f"    rank {rank}: counted {found.peak / 1e9:.2f} GB, account {account.allocated / 1e9:.2f} "
            f"({account.allocated / found.peak - 1:+.1%}), {host if found.on_host else ''}"
            f"closed forms {off or 'exact'}; {time.process_time() - begun:.0f} s of one core",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one row: MODEL,GPUS,GPU")
    parser.add_argument("--lengths", nargs="+", default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--max-step-hours", type=float, default=12.0)
    parser.add_argument("--no-dry-run", action="store_true", help="the account alone: seconds a row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for row in ROWS:
        if given.only in (None, f"{row.model},{row.gpus},{row.gpu}"):
            for name, plan in plans(row, given.lengths, given.max_step_hours).items():
                show(row, name, plan, not given.no_dry_run)


if __name__ == "__main__":
    main()
