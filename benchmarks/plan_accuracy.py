"""How well the planner predicts published training rates: `python -m benchmarks.plan_accuracy [--rows]`.

Pure arithmetic, a few seconds. The coefficients of megasp/planner/rates.py were fitted to rows of models below
`FITTED` parameters; judge the planner by the models above. `--markdown` prints the tables of docs/planner.md.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks import published_memory
from benchmarks.published import Row, rows
from megasp.planner.rates import Rates
from megasp.planner.step_time import StepTime, step_time

FITTED = 8.5
"""Billions of parameters: smaller models were fitted to, without nanotron's rows; the others were held out."""

NOISE = 1.10
"""Rates of one model that lie closer together than this are not ranked by anything but chance: the same workload moves
by 5% between versions of one stack."""

VERSIONS = 1.05
"""By so much the same workload moves between versions of one stack."""

EXPLAINED = 0.20
"""Rows that miss by more are listed one by one."""


@dataclass(frozen=True)
class Prediction:
    """A row beside what the planner says of it."""

    row: Row
    predicted: StepTime

    @property
    def error(self) -> float:
        """Relative, of the step's time: above 0 the planner is too slow."""
        return self.predicted.seconds / self.row.seconds - 1

    @property
    def held_out(self) -> bool:
        return float(self.row["params_B"]) >= FITTED


def predictions() -> list[Prediction]:
    """Every row that counts."""
    return [Prediction(row, step_time(row.job, Rates(row.hardware))) for row in rows() if not row.reason_left_out]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which so large a share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]

    return statistics.correlation(ranks(list(left)), ranks(list(right)))


def correlations(made: Iterable[Prediction]) -> dict[tuple[str, str], tuple[int, float]]:
    """(rows, rank correlation of tokens/s per GPU) of each model, GPU and precision that has five different
    rates, and more than noise between them."""
    groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for prediction in made:
        groups[prediction.row.group].append(prediction)
    result = {}
    for group, members in groups.items():
        measured = [m.predicted.job.step_tokens / m.row.seconds / m.row.number("gpus") for m in members]
        if len(set(measured)) >= 5 and max(measured) > NOISE * min(measured):
            rates = [m.predicted.tokens_per_second_per_gpu for m in members]
            result[group] = len(members), spearman(measured, rates)
    return result


def ordered(made: Iterable[Prediction]) -> tuple[int, int]:
    """Of the pairs of rows of one model, GPU and precision whose measured rates lie further apart than versions of one
    stack do: how many are ranked as measured, and how many there are."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for p in made:
        measured = p.predicted.job.step_tokens / p.row.seconds / p.row.number("gpus")
        groups[p.row.group].append((measured, p.predicted.tokens_per_second_per_gpu))
    pairs = [pair for members in groups.values() for pair in combinations(sorted(members), 2)]
    apart = [(slow, fast) for slow, fast in pairs if fast[0] > VERSIONS * slow[0]]
    return sum(slow[1] < fast[1] for slow, fast in apart), len(apart)


def regrets(made: Iterable[Prediction]) -> dict[str, float]:
    """Where three layouts or more of one model, GPU, count and length were measured in one stack: how much slower than
    the best the planner's choice is."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in made:
        row = p.row
        same = (row["model"], f"{row['gpus']} x {row['gpu_type']}", row["precision"], row["seq_len"], row["source"])
        groups[", ".join(same)].append(p)
    result = {}
    for name, members in groups.items():
        rates = {
            (m.predicted.job.layout, m.predicted.job.plan, m.predicted.job.recompute, m.predicted.job.micro_batch): (
                m.predicted.seconds / m.predicted.job.step_tokens,
                m.row.seconds / m.predicted.job.step_tokens,
            )
            for m in members
        }
        if len(rates) >= 3:
            best = min(measured for _, measured in rates.values())
            result[name] = min(rates.values())[1] / best - 1
    return result


def table(made: list[Prediction]) -> list[str]:
    """Errors of all rows, and by stack."""
    lines = ["| rows | number | median error | 90th percentile | median signed |", "| --- | --- | --- | --- | --- |"]

    def line(name: str, some: list[Prediction]) -> None:
        errors = [p.error for p in some]
        size = [abs(error) for error in errors]
        lines.append(
            f"| {name} | {len(some)} | {statistics.median(size):.1%} | {quantile(size, 0.9):.1%} "
            f"| {statistics.median(errors):+.1%} |"
        )

    line("all", made)
    line(f"models that were fitted to (below {FITTED:g}B)", [p for p in made if not p.held_out])
    line("held-out models", [p for p in made if p.held_out])
    for stack in dict.fromkeys(p.row["framework"] for p in made):
        line(stack, [p for p in made if p.row["framework"] == stack])
    return lines


def memory_table() -> list[str]:
    """Peak memory of the rows that state it, by what each stack holds."""
    made = published_memory.compared()
    lines = []
    for stack in ("all", *dict.fromkeys(row.row["framework"].split(" (")[0] for row in made)):
        errors = [row.error for row in made if stack in ("all", row.row["framework"].split(" (")[0])]
        sizes = [abs(error) for error in errors]
        lines.append(
            f"peak memory, {stack}: {len(errors)} rows, median error {statistics.median(sizes):.1%}, 90th percentile "
            f"{quantile(sizes, 0.9):.1%}, median signed {statistics.median(errors):+.1%}"
        )
    for row in sorted(made, key=lambda row: row.error):
        lines.append(
            f"    {row.error:+5.0%}  {row.row['id']:14} {row.row['model']} {row.job.layout.name} "
            f"micro-batch {row.row['micro_batch']}: {row.predicted / 1e9:.1f} GB, measured {row.measured / 1e9:.1f}"
        )
    left = Counter(published_memory.reasons()).most_common()
    return [*lines, "left out:", *(f"    {number:4}  {reason}" for reason, number in left)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="print every row")
    arguments = parser.parse_args()
    made = predictions()
    print("\n".join(table(made)))
    ranks = correlations(made)
    print(
        "\nSpearman rank correlation within model, GPU and precision: "
        f"median {statistics.median(r for _, r in ranks.values()):.2f}"
    )
    for (model, gpu), (number, correlation) in ranks.items():
        print(f"    {correlation:5.2f}  {model}, {gpu} ({number} rows)")
    right, pairs = ordered(made)
    print(f"pairs of them that lie more than {VERSIONS - 1:.0%} apart: {right} of {pairs} in the right order")
    lost = regrets(made)
    print(f"\nregret: median {statistics.median(lost.values()):.1%}, worst {max(lost.values()):.1%}")
    for name, value in lost.items():
        print(f"    {value:5.1%}  {name}")
    print(f"\nrows that miss by more than {EXPLAINED:.0%}:")
    for p in sorted(made, key=lambda p: p.error):
        if abs(p.error) > EXPLAINED or arguments.rows:
            layout, row = p.predicted.job.layout, p.row
            print(
                f"    {p.error:+5.0%}  {row['id']:14} {row['model']} {layout.name} micro-batch {row['micro_batch']}, "
                f"{row['seq_len']} tokens, {row['gpu_type']}: {p.predicted.seconds:.3g} s, measured {row.seconds:.3g} s"
            )
    print("\nleft out:")
    for reason, number in Counter(row.reason_left_out for row in rows() if row.reason_left_out).most_common():
        print(f"    {number:4}  {reason}")
    print("\n" + "\n".join(memory_table()))


if __name__ == "__main__":
    main()
