"""Models train the same under every way to split a sequence, whatever else is on: loss, gradients and weights, fp64."""

import dataclasses
import os

import pytest
import torch

from megasp import parallel_state, verify
from megasp.config.layout import Layout
from megasp.config.load import from_values, load, parser
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import accumulate_gradients
from tests.ranks import run_ranks

FULL_MATRIX = os.environ.get("MEGASP_FULL_MATRIX") == "1"
TOLERANCE = 1e-11

SAMPLE = [
    ("tp2-r2 dp2-r2 r4", "--sequence-parallel"),
    ("r3 u2-r2", "--reset-attention-mask --window-size 6 --attention-sinks 1 --attention-dropout 0.1 --seq-length 36"),
    ("r3", "--cp-comm-type lightseq --reset-attention-mask --recompute-granularity all-but-attention --seq-length 48"),
    (
        "u2 r3-u2",
        "--ulysses-head-chunks 2 --recompute-granularity all-but-attention --reset-attention-mask --seq-length 36 "
        "--attention-dropout 0.1",
    ),
    (
        "r2 u3",
        "--cp-comm-type all_gather --num-attention-heads 7 --num-query-groups 7 --hidden-size 56 --seq-length 12",
    ),
]
WHOLE = [
    ("r2 r4 r8 tp2-r4 tp2-u2-r2 u2-r4 u4-r2", f"--cp-comm-type {mode} {documents} {recompute}")
    for mode in ("p2p", "lightseq", "all_gather")
    for documents in ("", "--reset-attention-mask --window-size 5", "--attention-dropout 0.1 --window-size 9")
    for recompute in ("", "--recompute-granularity full", "--recompute-granularity all-but-attention")
]


@pytest.mark.parametrize(("layouts", "flags"), SAMPLE + (WHOLE if FULL_MATRIX else []))
def test_any_layout_trains_the_same(layouts: str, flags: str) -> None:
    known = parser("test", "", [verify.Options])
    config, *_ = load(["--global-batch-size", "4", *flags.split()], known, verify.Options, verify.DEFAULTS)
    chosen = [Layout.parse(name) for name in layouts.split()]
    for layout, worst in verify.compare(verify.resolve(config), chosen, steps=2):
        assert worst.overall < TOLERANCE, (layout.name, worst)


def _few_targets(layout: Layout, unmasked: range) -> list[float]:
    """Loss, count of targets, and gradient norms where only some positions have a target."""
    config = verify.in_layout(from_values(verify.DEFAULTS), layout)
    state = parallel_state.build(layout, torch.device("cpu"))
    training = build(config, state, torch.float64)
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        batches = [
            dataclasses.replace(batch, loss_mask=batch.loss_mask * [p in unmasked for p in batch.positions])
            for batch in loader.step()
        ]
    loss, tokens = accumulate_gradients(training, batches)
    return [loss, tokens, *(float(p.grad.norm()) for p in training.replicas.masters)]


@pytest.mark.parametrize("layout", [Layout(ulysses=2), Layout(ring=2)], ids=["u2", "r2"])
@pytest.mark.parametrize("unmasked", [range(9, 12), range(0)], ids=["of one rank", "none"])
def test_a_rank_without_a_target_contributes_zero(layout: Layout, unmasked: range) -> None:
    """Positions 8 to 15 are with the first rank where shards are contiguous, with the second of a ring in zigzag."""
    [want] = run_ranks(_few_targets, 1, Layout(), unmasked)
    for found in run_ranks(_few_targets, 2, layout, unmasked):
        assert found == pytest.approx(want, abs=1e-12)
