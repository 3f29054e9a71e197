"""The metrics file is strict JSON that survives a crash and a resume; the console line reads well."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megasp import log
from megasp.training.metrics import Metrics, Run, drop_later_lines, duration

KEYS = [
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops_per_device", "mfu", "memory_gib", "loss_scale",
    "layout",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def run(**changes: Any) -> Run:
    values = {"layout": "tp2-u2", "devices": 4, "device": torch.device("cpu"), "flops_per_token": 4e8}
    return Run(**(values | {"peak_tflops": None, "train_steps": 300} | changes))  # type: ignore[arg-type]


def train(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics.step(step, loss=10 / 3 / step, grad_norm=0.87, lr=1.2e-3, tokens=4000 * step, read=4096, seconds=0.5)
        if step % 2 == 0:
            metrics.validation(step, loss=7.0)


def read(file: Path) -> list[dict[str, Any]]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    return [json.loads(line, parse_constant=reject) for line in file.read_text().splitlines()]


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "new" / "metrics.jsonl"
    with Metrics(run(peak_tflops=2.0), file=file) as metrics:
        train(metrics, 1, 2)
        lines = read(file)  # before close: nothing waits in a buffer
    assert [list(line) for line in lines] == [KEYS, KEYS, ["step", "validation_loss", "layout"]]
    assert lines[0] | {"memory_gib": 0} == {
        "step": 1,
        "loss": 10 / 3,
        "grad_norm": 0.87,
        "lr": 1.2e-3,
        "tokens": 4000,
        "tokens_per_s": 8192.0,
        "tflops_per_device": 8192 * 4e8 / 4 / 1e12,
        "mfu": 8192 * 4e8 / 4 / 1e12 / 2.0,
        "memory_gib": 0,
        "loss_scale": None,
        "layout": "tp2-u2",
    }
    assert 0.05 < lines[0]["memory_gib"] < 100


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    with Metrics(run(), file=tmp_path / "m") as metrics:
        metrics.step(1, loss=float("nan"), grad_norm=float("inf"), lr=0.0, tokens=1, read=1, seconds=1.0)
        metrics.step(2, loss=1.0, grad_norm=None, lr=0.0, tokens=2, read=1, seconds=1.0)
        metrics.validation(2, loss=float("inf"))
    lines = read(tmp_path / "m")
    assert (lines[0]["loss"], lines[0]["grad_norm"], lines[0]["mfu"], lines[1]["grad_norm"]) == (None,) * 4
    assert lines[2]["validation_loss"] is None


def test_a_resumed_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    with Metrics(run(), file=tmp_path / "unbroken") as metrics:
        train(metrics, 1, 7)
    file = tmp_path / "resumed"
    with Metrics(run(), file=file) as metrics:
        train(metrics, 1, 6)
    with file.open("a") as cut:
        cut.write('{"step": 3, "loss": 5.')  # a crash in the middle of a line
    with Metrics(run(start_step=4), file=file) as metrics:
        train(metrics, 5, 7)
    unbroken, resumed = read(tmp_path / "unbroken"), read(file)
    for line in unbroken + resumed:
        line.pop("memory_gib", None)
    assert resumed == unbroken


def test_starting_anew_starts_the_file_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with Metrics(run(), file=tmp_path / "m") as metrics:
            train(metrics, 1, 1)
    assert len(read(tmp_path / "m")) == 1


def test_dropping_leaves_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}\n')
    drop_later_lines(tmp_path / "m", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (tmp_path / "m").read_text() == '{"step": 1}\n'


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Metrics(run(), file=tmp_path / "m", tensorboard_dir=tmp_path / "board") as metrics:
        train(metrics, 1, 2)
    assert not list(tmp_path.iterdir())


def test_console(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    monkeypatch.setattr("megasp.training.metrics.peak_memory_gib", lambda device: 0.43)
    with Metrics(run(start_step=100), log_interval=20) as metrics:
        for step in range(101, 121):
            metrics.step(step, loss=5.12341, grad_norm=0.87, lr=1.2e-3, tokens=4096 * step, read=4096, seconds=2.7)
        metrics.validation(120, loss=5.0)
    assert said[1:] == [
        "step 120/300 | loss 5.1234 | lr 1.2e-03 | grad norm 0.87 | 1,517 tokens/s | 0.15 TFLOP/s per device "
        "(MFU n/a) | 0.43 GiB | 8 min left",
        "step 120/300 | validation loss 5.0000 | perplexity 148.41",
    ]
    assert said[0].startswith("step 101/300 | ")


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, last in ((0, 4), (2, 3)):  # the second attempt resumes at step 2
        with Metrics(run(start_step=start), tensorboard_dir=tmp_path) as metrics:
            train(metrics, start + 1, last)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3]
    assert {"learning-rate", "grad-norm", "lm loss validation", "lm loss validation ppl"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (480, "8 min"), (19200, "5 h 20 min"), (273600, "3 d 4 h"), (3599, "1 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
