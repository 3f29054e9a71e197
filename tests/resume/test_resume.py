"""A stopped run goes on as if it had never stopped, and refuses to go on where "sample n" would mean other tokens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megasp import checkpoints, parallel_state
from megasp.cli import main
from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.data import IndexedDatasetBuilder
from megasp.errors import CheckpointError, DataError
from megasp.training.build import build
from megasp.training.datasets import resolve
from megasp.training.pretrain import pretrain
from tests.ranks import run_ranks

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu "
    "--ffn-hidden-size 64 --position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0.1 --vocab-size 128 --seq-length 16"
)
RUN = f"{MODEL} --train-iters 6 --lr 1e-2 --global-batch-size 4 --eval-iters 1 --eval-interval 3 --log-interval 1"
LAYOUT = "--tensor-model-parallel-size 2 --ulysses-size 2 --sequence-parallel"


def train(flags: str) -> None:
    """Pretraining on this rank of an initialized process group."""
    import torch.distributed as dist

    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    layout = validate(config, dist.get_world_size())
    pretrain(build(config, parallel_state.build(layout, torch.device("cpu"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text", 60)


def write_corpus(prefix: Path, documents: int) -> str:
    rng = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            builder.add_document(rng.integers(0, 128, rng.integers(5, 60)))
    return str(prefix)


def losses(save: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("validation_loss"))) for row in rows]


def weights(save: Path) -> dict[str, torch.Tensor]:
    directory = checkpoints.find_latest(save)
    assert directory is not None
    files = sorted(directory.glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize(("world_size", "layout"), [(1, ""), (4, LAYOUT)])
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_bitwise(tmp_path: Path, corpus: str, world_size: int, layout: str, precision: str) -> None:
    flags = f"{RUN} {layout} {precision} --data-path {corpus} --split 80,20,0"
    run_ranks(train, world_size, f"{flags} --save {tmp_path}/unbroken")
    run_ranks(train, world_size, f"{flags} --save {tmp_path}/stopped --exit-interval 3")
    assert len(losses(tmp_path / "stopped")) == 4
    run_ranks(train, world_size, f"{flags} --save {tmp_path}/stopped --load {tmp_path}/stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    resumed, unbroken = weights(tmp_path / "stopped"), weights(tmp_path / "unbroken")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)


def test_resume_in_another_layout(tmp_path: Path, corpus: str) -> None:
    flags = f"{RUN} --data-path {corpus} --split 80,20,0"
    run_ranks(train, 1, f"{flags} --save {tmp_path}/one")
    run_ranks(train, 4, f"{flags} {LAYOUT} --save {tmp_path}/two --exit-interval 3")
    run_ranks(train, 2, f"{flags} --save {tmp_path}/two --load {tmp_path}/two")
    for (step, loss), (_, reference) in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert loss == pytest.approx(reference, rel=1e-5), step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A checkpoint of step 3 of 6."""
    save = tmp_path_factory.mktemp("saved")
    run_ranks(train, 1, f"{RUN} --data-path {corpus} --split 80,20,0 --save {save} --exit-interval 3")
    return save


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--split 80,20,0 --seed 1", "the seed orders the samples"),
        ("--split 80,20,0 --num-layers 1", "another model"),
    ],
)
def test_refused(saved: Path, corpus: str, change: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _train_here(f"{RUN} --data-path {corpus} --load {saved} {change}")


def _train_here(flags: str) -> None:
    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    validate(config, 1)
    pretrain(build(config, parallel_state.ParallelState.single()))


def test_an_appended_corpus_is_noticed(saved: Path, tmp_path: Path) -> None:
    longer = write_corpus(tmp_path / "text", 61)
    for split in ("80,20,0", "70,30,0"):
        with pytest.raises(DataError, match="restore it, or begin a new epoch"):
            _train_here(f"{RUN} --data-path {longer} --split {split} --load {saved}")


def test_finetune_takes_the_weights_alone(saved: Path, corpus: str, tmp_path: Path) -> None:
    _train_here(f"{RUN} --data-path {corpus} --split 70,30,0 --load {saved} --finetune --save {tmp_path}/f")
    assert losses(tmp_path / "f")[0][0] == 1
    _train_here(f"{RUN} --data-path {corpus} --split 70,30,0 --save {tmp_path}/anew")
    assert losses(tmp_path / "f")[0] != losses(tmp_path / "anew")[0]


def test_other_seed_and_fresh_optimizer_by_flag(saved: Path, corpus: str, tmp_path: Path) -> None:
    flags = f"{RUN} --data-path {corpus} --split 80,20,0 --load {saved} --seed 1 --no-load-rng --no-load-optim"
    _train_here(f"{flags} --save {tmp_path}")
    assert losses(tmp_path)[0][0] == 4


def test_a_checkpoint_without_optimizer(corpus: str, tmp_path: Path) -> None:
    flags = f"{RUN} --data-path {corpus} --split 80,20,0"
    _train_here(f"{flags} --save {tmp_path} --no-save-optim --exit-interval 3")
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        _train_here(f"{flags} --load {tmp_path}")
    _train_here(f"{flags} --load {tmp_path} --no-load-optim")


def test_nothing_to_load_starts_anew(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"pretrain {RUN} --data-path {corpus} --load {tmp_path} --train-iters 1 --eval-iters 0"
    assert main(flags.split()) == 0
    assert "training starts anew" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(f"pretrain {RUN} --data-path {corpus} --save {tmp_path}/file/ckpt".split()) == 2
    said = capsys.readouterr().err.strip()
    assert str(tmp_path / "file") in said and "\n" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(corpus: str, tmp_path: Path, number: signal.Signals) -> None:
    flags = f"pretrain {RUN} --data-path {corpus} --save {tmp_path} --train-iters 100000 --eval-iters 0"
    process = subprocess.Popen(
        [sys.executable, "-m", "megasp.cli", *flags.split()],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or not losses_so_far(tmp_path):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"a rank received {number.name}" in output
    manifest = checkpoints.read_manifest(checkpoints.find_latest(tmp_path))
    assert manifest.step == len(losses_so_far(tmp_path))


def losses_so_far(save: Path) -> list[str]:
    return (save / "metrics.jsonl").read_text().splitlines()


def test_a_new_run_does_not_replace_another(saved: Path, corpus: str) -> None:
    before = (saved / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="add --load"):
        _train_here(f"{RUN} --data-path {corpus} --split 80,20,0 --save {saved}")
    assert (saved / "metrics.jsonl").read_text() == before


def test_finetune_needs_a_checkpoint(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}: --finetune takes one"):
        _train_here(f"{RUN} --data-path {corpus} --load {tmp_path} --finetune")


def test_a_failing_evaluation_does_not_lose_the_run(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("evaluation")

    monkeypatch.setattr("megasp.training.pretrain.evaluate", fail)
    with pytest.raises(RuntimeError, match="evaluation"):
        _train_here(f"{RUN} --data-path {corpus} --split 80,20,0 --save {tmp_path} --eval-interval 100")
    directory = checkpoints.find_latest(tmp_path)
    assert directory is not None and checkpoints.read_manifest(directory).step == 6


def test_train_samples_count_what_was_read(corpus: str, tmp_path: Path) -> None:
    """Another batch size on resume changes the steps that are left, not the samples."""
    flags = (
        f"{RUN.replace('--train-iters 6', '--train-samples 40')} --data-path {corpus} --split 80,20,0 --save {tmp_path}"
    )
    _train_here(f"{flags} --exit-interval 5")
    _train_here(f"{flags.replace('--global-batch-size 4', '--global-batch-size 10')} --load {tmp_path}")
    manifest = checkpoints.read_manifest(checkpoints.find_latest(tmp_path))
    assert (manifest.step, manifest.metadata["progress"]["samples"]) == (7, 40)


def test_resume_in_another_zero_stage(tmp_path: Path, corpus: str) -> None:
    """Hybrid ZeRO-1 on 4 ranks, then ZeRO-3 on 2, then one process: the losses of one unbroken process."""
    flags = f"{RUN} --data-path {corpus} --split 80,20,0"
    run_ranks(train, 1, f"{flags} --save {tmp_path}/one")
    go_on = f"{flags} --save {tmp_path}/zero --load {tmp_path}/zero"
    run_ranks(
        train, 4, f"{go_on} --use-distributed-optimizer --num-distributed-optimizer-instances 2 --exit-interval 2"
    )
    run_ranks(train, 2, f"{go_on} --data-parallel-sharding-strategy optim_grads_params --exit-interval 4")
    run_ranks(train, 1, go_on)
    for (step, loss), (_, reference) in zip(losses(tmp_path / "zero"), losses(tmp_path / "one"), strict=True):
        assert loss == pytest.approx(reference, rel=1e-5), step


def test_a_resumed_sharded_run_is_unbroken(tmp_path: Path, corpus: str) -> None:
    """bf16 ZeRO-3, bit for bit."""
    flags = f"{RUN} --bf16 --data-parallel-sharding-strategy optim_grads_params --data-path {corpus} --split 80,20,0"
    run_ranks(train, 2, f"{flags} --save {tmp_path}/unbroken")
    run_ranks(train, 2, f"{flags} --save {tmp_path}/stopped --exit-interval 3")
    run_ranks(train, 2, f"{flags} --save {tmp_path}/stopped --load {tmp_path}/stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
