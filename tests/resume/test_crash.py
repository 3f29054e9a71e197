"""A run that is killed at random moments, again and again, while it saves in the background: its latest good checkpoint
always loads, and it ends where an unbroken run ends, to the bit."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megasp.checkpoints import newest_good
from megasp.checkpoints.verify import damage
from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.local_ranks import PRELOAD
from megasp.parallel_state import ParallelState
from megasp.training.build import build
from megasp.training.datasets import resolve
from megasp.training.pretrain import pretrain
from tests.resume.test_resume import RUN, weights

FULL = "MEGASP_FULL_MATRIX" in os.environ
KILLS = 50 if FULL else 2
STEPS = 2000 if FULL else 60
FLAGS = (
    f"{RUN} --mock-data --eval-iters 0 --train-iters {STEPS} --async-save --save-interval 1 --keep-last 3 "
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 512"
)


def train(flags: str, began: str | None = None) -> None:
    torch.set_num_threads(1)
    config, _, _, _ = load(flags.split(), parser("pretrain", ""))
    config = resolve(config)
    validate(config, 1)
    training = build(config, ParallelState.single())
    if began:
        Path(began).touch()
    pretrain(training)


@pytest.mark.parametrize("background", [True, False] if FULL else [True])
def test_killed_at_random_moments(tmp_path: Path, background: bool) -> None:
    flags = FLAGS if background else FLAGS.replace("--async-save ", "")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    dice, root, began = random.Random(7), tmp_path / "killed", tmp_path / "began"
    halfway = 0
    for _ in range(KILLS):
        began.unlink(missing_ok=True)
        child = context.Process(target=train, args=(f"{flags} --save {root} --load {root}", str(began)))
        child.start()
        deadline = time.monotonic() + 300
        while not began.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.4)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        halfway += bool(list(root.glob(".step_*")))
        good = newest_good(root, ParallelState.single())
        if good is not None:
            assert damage(good) == []
    assert halfway or not FULL, "no kill met a save: the test shows nothing"
    for last in (f"{flags} --save {root} --load {root}", f"{flags} --save {tmp_path / 'unbroken'}"):
        child = context.Process(target=train, args=(last,))
        child.start()
        child.join()
        assert child.exitcode == 0
    killed, unbroken = weights(root), weights(tmp_path / "unbroken")
    assert killed.keys() == unbroken.keys()
    assert all(torch.equal(killed[key], unbroken[key]) for key in unbroken)
