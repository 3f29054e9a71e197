"""Runs that save in the background, on disks that fail, and that begin with a Hugging Face model."""

import errno
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megasp import parallel_state
from megasp.checkpoints import find_latest, safetensors_file
from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from megasp.training import resume
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader, resolve
from megasp.training.pretrain import pretrain
from megasp.training.step import evaluate
from tests.ranks import run_ranks
from tests.resume.test_resume import LAYOUT, RUN, train, weights
from tests.unit.checkpoints.families import make

MOCK = f"{RUN} --mock-data --eval-iters 0"


def test_in_the_background(tmp_path: Path) -> None:
    """Bit for bit what saving in the foreground writes, of every step; and what is to be kept is kept."""
    flags = f"{MOCK} {LAYOUT} --save-interval 1"
    run_ranks(train, 4, f"{flags} --save {tmp_path}/front")
    run_ranks(train, 4, f"{flags} --save {tmp_path}/back --async-save")
    for step in range(1, 7):
        front, back = (weights(tmp_path / name / f"step_{step:08d}") for name in ("front", "back"))
        assert front.keys() == back.keys() and all(torch.equal(front[key], back[key]) for key in front)
    train_here(f"{MOCK} --save-interval 1 --save {tmp_path}/few --async-save --keep-last 2 --keep-every 3")
    assert [path.name[-1] for path in sorted((tmp_path / "few").glob("step_*"))] == ["3", "5", "6"]


def test_saves_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is due while another is at work waits for it, and both are there."""
    write, at_work, most = safetensors_file.write, threading.Semaphore(1), []

    def slow(*args: Any) -> Any:
        most.append(at_work.acquire(blocking=False))
        time.sleep(0.05)
        at_work.release()
        return write(*args)

    monkeypatch.setattr(safetensors_file, "write", slow)
    train_here(f"{MOCK} --save {tmp_path} --save-interval 1 --async-save")
    assert most == [True] * 6 and len(list(tmp_path.glob("step_*"))) == 6


class FullDisk:
    """Refuses the given writes, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: set[int]) -> None:
        self.refuse, self.count, self.write = refuse, 0, safetensors_file.write
        monkeypatch.setattr(safetensors_file, "write", self)

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        if self.count in self.refuse:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(*args)


def train_here(flags: str) -> None:
    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    validate(config, 1)
    pretrain(build(config, ParallelState.single()))


@pytest.mark.parametrize("background", ["", "--async-save"])
def test_training_goes_on_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, background: str
) -> None:
    FullDisk(monkeypatch, {2})
    monkeypatch.setattr(logging.getLogger("megasp"), "propagate", True)
    train_here(f"{MOCK} --save {tmp_path} --save-interval 2 {background}")
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step_00000002", "step_00000006"]
    assert "saving" in caplog.text and "No space left on device" in caplog.text and "Training goes on" in caplog.text


@pytest.mark.parametrize("background", ["", "--async-save"])
def test_or_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str) -> None:
    FullDisk(monkeypatch, {2})
    with pytest.raises(CheckpointError, match="No space left on device"):
        train_here(f"{MOCK} --save {tmp_path} --save-interval 2 {background} --exit-on-save-error --train-iters 1000")
    assert find_latest(tmp_path) == tmp_path / "step_00000002"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 900


def test_the_last_one_must_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, {3})
    with pytest.raises(CheckpointError, match="No space left on device"):
        train_here(f"{MOCK} --save {tmp_path} --save-interval 2")


def test_goes_back_to_the_one_before(tmp_path: Path) -> None:
    flags = f"{MOCK} --save {tmp_path} --save-interval 2"
    train_here(flags)
    before = {name: tensor.clone() for name, tensor in weights(tmp_path).items()}  # they are views of the file
    path = tmp_path / "step_00000006" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"with --load-strict the newest checkpoint must be good"):
        train_here(f"{flags} --load {tmp_path} --load-strict")
    train_here(f"{flags} --load {tmp_path}")
    after = weights(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


LAYOUTS = {"tp1": "", "tp2-pp2-u2": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --ulysses-size 2"}


def _loss(flags: str) -> float:
    """Of the first batch, by a model straight from safetensors."""
    world_size = torch.distributed.get_world_size()
    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    training = build(config, parallel_state.build(validate(config, world_size), torch.device("cpu")))
    resume.resume(training, resume.find(config, training.state))
    with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
        return evaluate(training, [loader.read(0)])


def _theirs(model: Any, flags: str) -> float:
    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    training = build(config, ParallelState.single())
    with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
        batches = loader.read(0)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(torch.as_tensor(batch.tokens).long()).logits.flatten(0, 1),
                torch.as_tensor(batch.labels).long().flatten(),
            )
            for batch in batches
        ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["llama3.2", "qwen2", "qwen3", "gpt2", "mistral"])
def test_loss_of_a_hugging_face_model(tmp_path: Path, name: str) -> None:
    """As transformers computes it, in one process and over tp2-pp2-u2."""
    model = make(name, tmp_path)
    flags = f"--load-hf {tmp_path} --mock-data --seq-length 32 --lr 1e-3 --train-iters 1 --global-batch-size 2"
    expected = _theirs(model, flags)
    for world_size, layout in ((1, LAYOUTS["tp1"]), (8, LAYOUTS["tp2-pp2-u2"])):
        for loss in run_ranks(_loss, world_size, f"{flags} {layout}"):
            assert loss == pytest.approx(expected, rel=1e-5)


def test_training_begins_with_a_hugging_face_model(tmp_path: Path) -> None:
    """At a longer context; and what was saved wins over it when the run is started again."""
    make("llama", tmp_path / "hf")
    flags = (
        f"--load-hf {tmp_path / 'hf'} --mock-data --seq-length 128 --rotary-scaling yarn --rotary-scaling-factor 2 "
        f"--lr 1e-3 --train-iters 4 --eval-iters 0 --save {tmp_path / 'ckpt'}"
    )
    train_here(f"{flags} --exit-interval 2")
    train_here(f"{flags} --load {tmp_path / 'ckpt'}")
    assert len((tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()) == 4
    with pytest.raises(CheckpointError, match=r"another model \(num_layers is 2 there and 3 here\)"):
        train_here(f"{flags} --num-layers 3 --save {tmp_path / 'other'}")


def test_a_converted_checkpoint_is_weights_alone(tmp_path: Path) -> None:
    from megasp.checkpoints.hugging_face import from_hf

    make("llama", tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    flags = (
        f"--load-hf {tmp_path / 'hf'} --load {tmp_path / 'ckpt'} --mock-data --seq-length 16 --lr 1e-3 --train-iters 1"
    )
    with pytest.raises(CheckpointError, match=r"holds weights alone: .*; add --finetune"):
        train_here(f"{flags} --eval-iters 0")
    train_here(f"{flags} --eval-iters 0 --finetune")
