"""Predictions beside published results: the errors that docs/planner.md states do not grow."""

import statistics

from benchmarks.plan_accuracy import correlations, predictions, quantile, regrets, spearman
from benchmarks.published import rows


def test_accuracy_on_published_results() -> None:
    made = predictions()
    assert len(made) >= 280
    for some in ([p for p in made if p.held_out], made):
        errors = [abs(p.error) for p in some]
        assert statistics.median(errors) < 0.06 and quantile(errors, 0.9) < 0.16
    assert statistics.median(rank for _, rank in correlations(made).values()) > 0.9
    lost = regrets(made).values()
    assert statistics.median(lost) <= 0.03 and max(lost) <= 0.10


def test_every_row_counts_or_has_its_reason() -> None:
    reasons = [row.reason_left_out for row in rows()]
    assert len(reasons) == 378 and sum(reason is not None for reason in reasons) < 95


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
