"""Models train the same under every way to split a sequence, whatever else is on: loss, gradients and weights, fp64."""

import os

import pytest

from megasp import verify
from megasp.config.layout import Layout
from megasp.config.load import load, parser

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
