"""The losses of a fixed run, so that a change of the numbers is made on purpose.

A change that is meant to leave the computation alone must leave this file alone. Rewrite it with
    python -m tests.golden.test_losses
"""

import json
from pathlib import Path

import pytest

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import train_step
from megasp.verify import DEFAULTS

FILE = Path(__file__).with_name("losses.json")


def fixed_run() -> list[float]:
    config = from_values(DEFAULTS)
    state = parallel_state.ParallelState.single()
    training = build(config, state)
    assert state.layout == Layout()
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        return [train_step(training, loader.step(), 1e-2).loss for _ in range(8)]


def test_losses() -> None:
    found, golden = fixed_run(), json.loads(FILE.read_text())
    assert found == pytest.approx(golden, rel=1e-4)
    assert golden[-1] < golden[0] - 0.1


if __name__ == "__main__":
    FILE.write_text(json.dumps(fixed_run(), indent=1) + "\n")
