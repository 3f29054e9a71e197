"""A run whose data changes between its parts: what it trains on is what `data explain` says."""

import re
from pathlib import Path

import numpy as np
import pytest

from megasp import cli, log
from megasp.data import IndexedDatasetBuilder, phases
from megasp.errors import CheckpointError, DataError
from megasp.training import pretrain

MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --disable-bias-linear --position-embedding-type rope "
    "--attention-dropout 0 --vocab-size 100 --lr 1e-3 --eval-interval 100 --micro-batch-size 2 --num-workers 0"
)


@pytest.fixture(autouse=True)
def corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("web", "books", "held", "other"):
        with IndexedDatasetBuilder(name, np.uint16) as builder:
            for length in random.integers(20, 200, 60):
                builder.add_document(random.integers(0, 100, length))


def train(flags: str) -> list[list[int]]:
    """Run `megasp pretrain`; the samples of each training step."""
    steps: list[list[int]] = []
    step = pretrain.train_step

    def watched(training, batches, *rates):
        steps.append([int(k) for batch in batches for k in batch.samples])
        return step(training, batches, *rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train_step", watched)
        assert pretrain.main(f"{MODEL} {flags}".split(), "megasp pretrain") == 0
    return steps


def explained(step: int, capsys) -> list[int]:
    capsys.readouterr()
    assert cli.main(["data", "explain", "--load", "ck", "--step", str(step)]) == 0
    return [int(k) for k in re.findall(r"^sample (\d+): ", capsys.readouterr().out, re.M)]


def test_ramp_up_length_and_blend_change_between_the_parts_of_a_run(capsys):
    blend = "--data-path 0.7 web 0.3 books --eval-iters 0 --save ck --load ck"
    steps = train(f"{blend} --seq-length 16 --global-batch-size 8 --rampup-batch-size 2 2 20 --train-iters 8")
    steps += train(f"{blend} --seq-length 32 --global-batch-size 8 --train-iters 11 --reset-position-ids")
    steps += train("--data-path books --eval-iters 0 --save ck --load ck --seq-length 32 --global-batch-size 4"
                   " --train-iters 13")  # fmt: skip
    assert [len(samples) for samples in steps] == [2, 2, 2, 2, 4, 4, 6, 8, 8, 8, 8, 4, 4]
    assert [k for samples in steps for k in samples] == list(range(sum(map(len, steps))))
    for number, samples in enumerate(steps, 1):
        assert explained(number, capsys) == samples
    stored = phases.read_checkpoint("ck")
    assert [(phase.step, phase.sample) for phase in stored] == [(0, 0), (8, 30), (11, 54)]


def test_a_corpus_that_grew_is_refused_or_begins_an_epoch():
    flags = "--data-path web --split 1 --eval-iters 0 --save ck --load ck --seq-length 16 --global-batch-size 2"
    train(f"{flags} --train-iters 2")
    for path in Path().glob("web.*"):
        path.unlink()
    with IndexedDatasetBuilder("web", np.uint16) as builder:
        builder.add_document(np.arange(90))
    with pytest.raises(DataError, match=r"in the run so far .*--start-new-epoch"):
        train(f"{flags} --train-iters 3")
    assert train(f"{flags} --train-iters 3 --start-new-epoch") == [[4, 5]]


def test_another_seed_is_refused():
    flags = "--data-path web --eval-iters 0 --save ck --load ck --seq-length 16 --global-batch-size 2"
    train(f"{flags} --train-iters 1")
    with pytest.raises(CheckpointError, match="--seed 5 resumes a run of --seed 1234"):
        train(f"{flags} --train-iters 2 --seed 5")
    assert train(f"{flags} --train-iters 2 --seed 5 --no-load-rng") == [[2, 3]]


def test_validation_sets_by_name_and_a_test_set(tmp_path):
    train(
        "--train-data-path 2 web 1 books --valid-data-path held other --multiple-validation-sets --test-data-path held"
        " --eval-iters 1 --save ck --seq-length 16 --global-batch-size 2 --train-iters 2"
    )
    metrics = Path("ck/metrics.jsonl").read_text()
    assert all(name in metrics for name in ('"held_loss"', '"other_loss"', '"test_loss"'))


def test_best_fit_packing_trains_resumes_and_is_explained(capsys):
    flags = (
        "--data-path 0.7 web 0.3 books --document-packing best-fit --eval-iters 1 --save ck --load ck --seq-length 64"
        " --global-batch-size 4 --reset-position-ids --reset-attention-mask"
    )
    unbroken = train(f"{flags.replace(' ck', ' whole')} --train-iters 6")
    steps = train(f"{flags} --train-iters 6 --exit-interval 3") + train(f"{flags} --train-iters 6")
    assert steps == unbroken
    losses = [re.findall(r'"loss": ([^,]*)', Path(name, "metrics.jsonl").read_text()) for name in ("ck", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) >= 6
    capsys.readouterr()
    assert explained(5, capsys) == steps[4]
    assert cli.main(["data", "explain", "--load", "ck", "--step", "5"]) == 0
    assert "packed by best-fit" in capsys.readouterr().out
    for change in ("--seq-length 32", "--document-packing stream"):
        with pytest.raises(DataError, match="packed differently"):
            train(f"{flags} {change} --train-iters 7")
    assert train(f"{flags} --seq-length 32 --train-iters 7 --start-new-epoch") == [[24, 25, 26, 27]]


def test_a_sorted_corpus_is_warned_of_at_start(monkeypatch):
    lengths = np.sort(np.random.default_rng(0).integers(20, 200, 300))
    with IndexedDatasetBuilder("sorted", np.uint16) as builder:
        for length in lengths:
            builder.add_document(np.zeros(length, int))
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    train("--data-path sorted web --eval-iters 0 --seq-length 16 --global-batch-size 2 --train-iters 1")
    assert len(said) == 1 and said[0].startswith("sorted looks sorted")


def test_megatrons_order_goes_on_and_takes_no_change():
    flags = "--data-path 0.5 web 0.5 books --split 1 --eval-iters 0 --save ck --load ck --seq-length 16"
    megatron = f"{flags} --global-batch-size 4 --data-order megatron --train-iters 6"
    train(f"{megatron} --exit-interval 3")
    assert train(megatron) == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    for change in ("--train-iters 8", "--seq-length 32", "--data-order keyed"):
        with pytest.raises(DataError, match="--data-order megatron with other data"):
            train(f"{megatron} {change}")
