"""Runs whose element-wise work is compiled: a layout as one process without it, a stopped run as an unbroken one."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from megasp.cli import main
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.model.compiled import missing
from megasp.verify import DEFAULTS, TOLERANCES, compare
from tests.resume.test_resume import MODEL, losses, train_here, weights, write_corpus

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=f"torch.compile needs {missing('cpu')}")


FULL = os.environ.get("MEGASP_FULL_MATRIX")


@pytest.mark.parametrize("layout", ["tp2-u2-pp2"] if FULL else ["tp2-pp2"])
def test_a_layout_trains_as_one_process_without_it(layout: str) -> None:
    """Tensor, sequence and pipeline parallel, recomputed norms and activations, two microbatches; with Ulysses in full,
    for every rank makes its own kernels."""
    given = {
        "hidden_dropout": 0.0,
        "sequence_parallel": True,
        "micro_batch_size": 4,
        "recompute_granularity": "selective",
    }
    config = from_values(DEFAULTS | given | {"compile": True, "recompute_modules": ("layernorm", "mlp_act")})
    plain = dataclasses.replace(config, kernels=dataclasses.replace(config.kernels, compile=False))
    [(_, worst)] = compare(config, [Layout.parse(layout)], steps=2, reference=plain)
    assert worst.overall <= TOLERANCES["fp64"], worst


@pytest.mark.skipif(not FULL, reason="two more sets of kernels: MEGASP_FULL_MATRIX=1")
def test_verify() -> None:
    given = "--compile --hidden-dropout 0 --layout u2 --steps 1"
    assert main(["verify", *given.split()]) == 0


def test_resume_is_bitwise(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text", 60)
    flags = f"{MODEL} --train-iters 4 --lr 1e-2 --global-batch-size 2 --micro-batch-size 2 --bf16 --compile"
    flags += f" --data-path {corpus} --split 100,0,0 --eval-iters 0 --log-interval 1"
    train_here(f"{flags} --save {tmp_path}/unbroken")
    train_here(f"{flags} --save {tmp_path}/stopped --exit-interval 2")
    train_here(f"{flags} --save {tmp_path}/stopped --load {tmp_path}/stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken") and len(losses(tmp_path / "stopped")) == 4
    resumed, unbroken = weights(tmp_path / "stopped"), weights(tmp_path / "unbroken")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)
