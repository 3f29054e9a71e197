"""`megasp verify` is a measuring instrument: it must see each kind of bug that it is there for."""

from collections.abc import Callable

import pytest
import torch

from megasp import verify
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.training.step import accumulate_gradients
from tests.ranks import run_ranks


def _with_scaled_gradients(*args: object) -> object:
    """A data-parallel reduction that averages where it should sum, as one rank of `verify` would meet it."""

    def averaged(training, microbatches):  # type: ignore[no-untyped-def]
        result = accumulate_gradients(training, microbatches)
        for master in training.replicas.masters:
            master.grad /= training.state.gradients.size
        return result

    verify.accumulate_gradients = averaged
    return verify._difference(*args)


def _with_unsynchronised_norms(*args: object) -> object:
    """Norm weights whose gradient stays this rank's share under sequence parallelism."""
    import megasp.training.step as step

    step.sum_partial_ = lambda parameters, axis, device: None
    return verify._difference(*args)


def _with_nan(*args: object) -> object:
    def poisoned(training, microbatches):  # type: ignore[no-untyped-def]
        result = accumulate_gradients(training, microbatches)
        training.replicas.masters[0].grad[0] = torch.nan
        return result

    verify.accumulate_gradients = poisoned
    return verify._difference(*args)


@pytest.mark.parametrize(
    ("bug", "layout"),
    [
        (_with_scaled_gradients, "dp2"),
        (_with_unsynchronised_norms, "tp2"),
        (_with_nan, "u2"),
    ],
)
def test_a_bug_is_seen(bug: Callable[..., object], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_values(verify.DEFAULTS | {"sequence_parallel": True})

    def run(fn: Callable[..., object], world_size: int, *args: object, **options: object) -> list[object]:
        return run_ranks(bug if fn is verify._difference else fn, world_size, *args)

    monkeypatch.setattr(verify, "run_ranks", run)
    [(_, worst)] = verify.compare(config, [Layout.parse(layout)], steps=1)
    assert worst.gradient[0] > 1e-3, worst
