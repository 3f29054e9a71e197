"""What a run of one layout saved, a run of another loads and saves again, bit for bit: weights and both moments.

Random pairs of real runs over tensor, pipeline (three schedules), Ulysses, ring and data ranks and the ZeRO stages:
some in the suite, more with MEGASP_FULL_MATRIX. `tests/unit/checkpoints/test_any_layout.py` has many more, without
ranks.
"""

import itertools
import os
import random
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasp import parallel_state
from megasp.checkpoints import CheckpointReader, find_latest
from megasp.config.load import load, parser
from megasp.config.schema import SHARDING_STRATEGIES
from megasp.config.validate import validate
from megasp.errors import ConfigError
from megasp.training import resume
from megasp.training.build import build
from megasp.training.datasets import resolve
from tests.ranks import run_ranks
from tests.resume.test_resume import MODEL, train

FULL = "MEGASP_FULL_MATRIX" in os.environ
PAIRS, RANKS = (40, 8) if FULL else (2, 4)
RUN = f"{MODEL} --num-layers 5 --mock-data --train-iters 2 --lr 1e-2 --global-batch-size 8 --eval-iters 0"
PIPELINES = (
    "--pipeline-schedule 1f1b",
    "--pipeline-schedule zbv",
    "--pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2",
)
Layout = tuple[int, str]
"""Ranks and flags."""


@cache
def layouts() -> list[Layout]:
    """All that are legal, each with two ranks on some axes."""
    found = []
    for tp, pp, ulysses, ring, dp in itertools.product((1, 2), repeat=5):
        world_size = tp * pp * ulysses * ring * dp
        pipelines = PIPELINES if pp > 1 else ("",)
        for pipeline, strategy, instances in itertools.product(pipelines, SHARDING_STRATEGIES, (1, 2)):
            flags = (
                f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} {pipeline} "
                f"--ulysses-size {ulysses} --ring-size {ring} --data-parallel-sharding-strategy {strategy} "
                f"--num-distributed-optimizer-instances {instances}"
            )
            try:
                validate(load(f"{RUN} {flags}".split(), parser("pretrain", ""))[0], world_size)
            except ConfigError:
                continue
            found.append((world_size, flags))
    return found


def pairs() -> list[tuple[Layout, Layout]]:
    dice, legal = random.Random(19), [each for each in layouts() if each[0] <= RANKS]
    return [(dice.choice(legal), dice.choice(legal)) for _ in range(PAIRS)]


def _save_again(flags: str) -> None:
    """Load as a run does that goes on, and save without a step between."""
    config = resolve(load(flags.split(), parser("pretrain", ""))[0])
    state = parallel_state.build(validate(config, dist.get_world_size()), torch.device("cpu"))
    training, found = build(config, state), resume.find(config, state)
    phases = resume.data_phases(config, state.layout, found)
    resume.save(training, resume.resume(training, found), phases)


def tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every canonical tensor, whole."""
    directory = find_latest(root)
    assert directory is not None
    reader = CheckpointReader(directory)
    return {name: reader.whole(name) for name in reader.manifest.tensors}


@pytest.mark.parametrize("pair", range(PAIRS))
def test_any_run_to_any_other(tmp_path: Path, pair: int) -> None:
    (before, saving), (after, loading) = pairs()[pair]
    run_ranks(train, before, f"{RUN} {saving} --save {tmp_path}/before")
    run_ranks(_save_again, after, f"{RUN} {loading} --load {tmp_path}/before --save {tmp_path}/after")
    there, here = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert there.keys() == here.keys() and {name.split("/")[0] for name in here} == {"model", "exp_avg", "exp_avg_sq"}
    assert [name for name in there if not torch.equal(there[name], here[name])] == [], (saving, loading)
