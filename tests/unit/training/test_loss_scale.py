"""The loss scale of fp16: its rules, skipped steps, gradients close to fp32's, and what a checkpoint keeps of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megasp.cli import main
from megasp.config.load import from_values
from megasp.training.loss_scale import LossScale
from megasp.training.step import accumulate_gradients, train_step
from tests.unit.training.test_step import batches, grads, training

PRETRAIN = (
    "pretrain --num-layers 1 --hidden-size 16 --num-attention-heads 2 --vocab-size 32 --seq-length 8 --lr 1e-3 "
    "--mock-data --eval-iters 0 --attention-dropout 0 --log-interval 1 --num-workers 0 --fp16"
)


def scale_of(**flags: Any) -> LossScale:
    return LossScale.of(from_values({"fp16": True} | flags))


def after(scale: LossScale, steps: str) -> float:
    """The scale after good steps (g) and overflows (o)."""
    for step in steps:
        scale.update(overflow=step == "o")
    return scale.scale


@pytest.mark.parametrize(
    ("flags", "steps", "expected"),
    [
        ({}, "", 2.0**32),
        ({}, "o", 2.0**32),  # hysteresis 2: the first overflow is forgiven
        ({}, "oo", 2.0**31),
        ({}, "ooo", 2.0**30),
        ({"hysteresis": 1}, "o", 2.0**31),
        ({"loss_scale_window": 2}, "gg", 2.0**33),
        ({"loss_scale_window": 2}, "gog", 2.0**32),  # an overflow begins the window anew
        ({"loss_scale_window": 2}, "gogoo", 2.0**30),  # good steps alone do not restore the hysteresis,
        ({"loss_scale_window": 2}, "ogggo", 2.0**33),  # a doubling does
        ({"initial_loss_scale": 4.0, "min_loss_scale": 2.0}, "oooooo", 2.0),
        ({"loss_scale": 128.0}, "oooo" + "g" * 2000, 128.0),
    ],
)
def test_rules(flags: dict[str, Any], steps: str, expected: float) -> None:
    """Those of Megatron-LM's DynamicGradScaler."""
    assert after(scale_of(**flags), steps) == expected


def test_other_precisions_have_none() -> None:
    assert after(LossScale.of(from_values({"bf16": True})), "ogog") == 1.0


def test_overflows_are_skipped_until_the_scale_fits() -> None:
    held = training(torch.float16, fp16=True, hysteresis=1)
    before = [master.detach().clone() for master in held.replicas.masters]
    steps = 0
    while not math.isfinite(train_step(held, batches([1.0]), 0.01).grad_norm):
        assert all(torch.equal(a, b) for a, b in zip(before, held.replicas.masters, strict=True)), "weights moved"
        steps += 1
    assert 5 < steps < 25 and held.loss_scale.scale == 2.0 ** (32 - steps)
    assert not any(torch.equal(a, b) for a, b in zip(before, held.replicas.masters, strict=True) if a.dim() > 1)


def test_gradients_are_those_of_fp32() -> None:
    """Up to fp16's rounding, with the scale taken off; the norm is reported without it."""
    half, single = training(torch.float16, fp16=True, initial_loss_scale=2.0**12), training(torch.float32)
    accumulate_gradients(half, batches([1.0, 0.5]))
    accumulate_gradients(single, batches([1.0, 0.5]))
    for scaled, exact in zip(grads(half), grads(single), strict=True):
        assert (scaled / 2**12 - exact).norm() <= 0.02 * exact.norm() + 1e-5
    half, single = training(torch.float16, fp16=True, initial_loss_scale=2.0**12), training(torch.float32)
    norms = [train_step(held, batches([1.0, 0.5]), 0.01).grad_norm for held in (half, single)]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_state_goes_on() -> None:
    flags = {"loss_scale_window": 3, "initial_loss_scale": 8.0}
    unbroken, first, second = (scale_of(**flags) for _ in range(3))
    expected = after(unbroken, "ogggoogg" + "goog")
    after(first, "ogggoogg")
    second.resume(json.loads(json.dumps(first.state())))
    assert after(second, "goog") == expected and second == unbroken


def test_constant_scale_is_the_flags_own() -> None:
    scale = scale_of(loss_scale=64.0)
    scale.resume({"scale": 2.0, "good_steps": 1, "overflows_left": 1})
    assert scale.scale == 64


def test_pretraining_reports_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen steps that overflow do not end the run; each is said; the scale is in the metrics and is resumed."""
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    assert main(f"{PRETRAIN} --train-iters 40 --save {unbroken}".split()) == 0
    said = capsys.readouterr()
    assert "weights not updated, loss scale now" in said.out + said.err
    assert main(f"{PRETRAIN} --train-iters 40 --save {stopped} --exit-interval 12".split()) == 0
    assert main(f"{PRETRAIN} --train-iters 40 --save {stopped} --load {stopped}".split()) == 0
    rows, again = ([json.loads(line) for line in (save / "metrics.jsonl").open()] for save in (unbroken, stopped))
    assert [row["loss_scale"] for row in rows] == [row["loss_scale"] for row in again]
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert rows[0]["loss_scale"] == 2.0**32 and rows[0]["grad_norm"] is None and rows[-1]["grad_norm"] is not None


def test_a_scale_that_cannot_fall_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{PRETRAIN} --train-iters 40 --loss-scale 1e38".split()) == 2
    assert "10 steps in a row had no finite gradient" in capsys.readouterr().err
