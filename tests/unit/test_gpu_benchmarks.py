"""The benchmarks for a GPU, at toy size on a CPU: that their code runs."""

from typing import Any

import pytest
import torch

from benchmarks.gpu import one_device

TOY: dict[str, Any] = one_device.LLAMA | {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8, "vocab_size": 128,
    "seq_length": 32,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has tests of its own, and takes half a minute."""
    from megasp.model import compiled

    monkeypatch.setattr(compiled, "COMPILER", lambda body, *tensors, **constants: body.eager(*tensors, **constants))
    monkeypatch.setattr(compiled, "check", lambda *_: None)


def test_options() -> None:
    rows = list(one_device.options(TOY, CPU, steps=1))
    assert [(row["recompute"], row["compile"]) for row in rows] == [
        (name, compiled) for name in one_device.RECOMPUTE for compiled in (False, True)
    ]
    assert all(row["tokens/s"] > 0 and row["account GB"] > 0 for row in rows)


@pytest.mark.parametrize("most", [0, 7, 16, 100, 5000])
def test_longest(most: int) -> None:
    asked: list[int] = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length <= most

    found = one_device.longest(fits, 4)
    assert found <= most < found + max(8, found // 16) and found % 4 == 0 and len(asked) < 20


def test_a_long_sequence_trains_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"recompute_granularity": "full", "grad_reduce_in_bf16": True, "compile": True}
    assert one_device.trains(TOY | long, 64, CPU, chunk=16)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(one_device, "measure", full)
    assert not one_device.trains(TOY | long, 64, CPU, chunk=16)


def test_one_rank() -> None:
    many = {"sequence_parallel": True, "global_batch_size": 4, "num_layers": 4}
    rows = list(one_device.one_rank(TOY | many, "tp2-pp2-dp2-zero1", 5, CPU, "h100-80"))
    assert [row["compile"] for row in rows] == [False, True]
    for row in rows:
        assert row["seconds"] > 0 and row["planner, mean of ranks"] > 0
        assert row["account GB"] == pytest.approx(row["dry run GB"], rel=0.1)
