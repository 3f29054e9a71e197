"""What a stage has sent is let go of as soon as it has left."""

from typing import Any

import pytest
import torch

from megasp.collectives import Pending
from megasp.config.layout import Layout
from megasp.parallel_state import Axis, ParallelState
from megasp.pipeline import messages as module
from megasp.pipeline.messages import Messages
from megasp.pipeline.schedules import schedule


class Work:
    """Of a backend that can tell when it is done."""

    def __init__(self) -> None:
        self.completed = False

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        self.completed = True


def test_evaluation_keeps_only_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Work] = []

    def start_send(x: torch.Tensor, link: Any) -> Pending:
        works.append(Work())
        return Pending(x, works[-1])

    monkeypatch.setattr(module, "start_send", start_send)
    axes = {"pp": Axis("pp", 2, 0)}
    state = ParallelState(Layout(pp=2), 0, torch.device("cpu"), axes, None, Axis("ends"), {(0, 1): Axis("pp", 2, 0)})  # type: ignore[arg-type]
    plan = schedule("1f1b", 2, 6, 1).forward_only()
    sender = Messages(plan, state, (1,), torch.float32)
    for action in plan.rows[0]:
        for work in works[:-1]:
            work.completed = True
        sender.send(action, torch.zeros(1))
        assert len(sender._sending[1]) <= 2
    sender.finish()
    assert all(work.completed for work in works)
