"""Predictions beside published results: the errors that docs/planner.md states do not grow."""

import statistics

from benchmarks import published_memory
from benchmarks.plan_accuracy import correlations, ordered, predictions, quantile, regrets, spearman
from benchmarks.published import by_cost, evenly, rows


def test_accuracy_on_published_results() -> None:
    made = predictions()
    assert len(made) >= 280
    for some in ([p for p in made if p.held_out], made):
        errors = [abs(p.error) for p in some]
        assert statistics.median(errors) < 0.055 and quantile(errors, 0.9) < 0.15
    ranks = [rank for _, rank in correlations(made).values()]
    assert statistics.median(ranks) > 0.95 and sum(rank < 0.85 for rank in ranks) <= 4
    right, pairs = ordered(made)
    assert right > 0.95 * pairs > 700
    lost = regrets(made).values()
    assert statistics.median(lost) <= 0.03 and max(lost) <= 0.10


def test_every_row_counts_or_has_its_reason() -> None:
    reasons = [row.reason_left_out for row in rows()]
    assert len(reasons) == 378 and sum(reason is not None for reason in reasons) < 95


def test_accuracy_on_published_peak_memory() -> None:
    made = published_memory.compared()
    assert len(made) >= 50
    errors = [abs(row.error) for row in made]
    assert statistics.median(errors) < 0.05 and quantile(errors, 0.9) < 0.18


def test_every_peak_counts_or_has_its_reason() -> None:
    stated = [row for row in rows() if row["peak_mem_GB"]]
    assert len(stated) == 79 == len(published_memory.compared()) + len(published_memory.reasons())


def test_what_no_implementation_goes_without_is_below_what_is_predicted() -> None:
    assert all(row.least < row.predicted for row in published_memory.compared())


def test_stages_of_other_stacks() -> None:
    llama3_8b = by_cost(8, layers=32, hidden=4096, ffn=14336, vocab=128256)
    assert llama3_8b == [5, 4, 4, 5, 4, 4, 4, 2]  # printed in nanotron's docs/3d_parallelism.md
    assert evenly(80, 40) == [2] * 40
    assert evenly(22, 8) == [2, 3, 3, 3, 3, 3, 3, 2]


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
