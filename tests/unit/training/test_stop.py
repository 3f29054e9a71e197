"""Stopping early: every condition, one decision for all ranks, and signal handlers put back."""

import os
import signal
import threading

import pytest
import torch.distributed as dist

from megasp.training.stop import StopConditions
from tests.ranks import run_ranks


def test_no_condition_goes_on() -> None:
    with StopConditions() as stop:
        assert all(stop.reason(step) is None for step in range(1, 10))


def test_interval() -> None:
    with StopConditions(exit_interval=4) as stop:
        assert [step for step in range(1, 10) if stop.reason(step)] == [4, 8]
        assert stop.reason(8) == "step 8 is a multiple of --exit-interval 4"


def test_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the start of the program, whatever building the model took."""
    now = 1000.0
    monkeypatch.setattr("megasp.training.stop._PROGRAM_START", now)
    monkeypatch.setattr("megasp.training.stop.time.monotonic", lambda: now)
    now += 60
    with StopConditions(exit_duration_in_mins=1.5) as stop:
        now += 29
        assert stop.reason(1) is None
        now += 2
        assert stop.reason(2) == "the 1.5 minutes of --exit-duration-in-mins are over"


@pytest.mark.parametrize("number", StopConditions.SIGNALS)
def test_signals(number: signal.Signals) -> None:
    def before(number: int, frame: object) -> None: ...

    original = signal.signal(number, before)
    try:
        with StopConditions(exit_interval=1) as stop:
            os.kill(os.getpid(), number)
            assert stop.reason(1) == f"a rank received {number.name}"
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, original)


def test_outside_the_main_thread() -> None:
    def body() -> None:
        with StopConditions(exit_interval=1) as stop:
            reasons.append(stop.reason(1))

    reasons: list[str | None] = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert reasons == ["step 1 is a multiple of --exit-interval 1"]


def _one_rank_is_told() -> list[str | None]:
    with StopConditions(exit_interval=2) as stop:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return [stop.reason(1), stop.reason(2)]


def test_all_ranks_agree() -> None:
    assert run_ranks(_one_rank_is_told, 2) == [["a rank received SIGTERM"] * 2] * 2
