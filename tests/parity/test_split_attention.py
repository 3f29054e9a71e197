"""Every mode of attention over a split sequence against the definition, fp64: out, dq, dk, dv by name, and the bytes.

The matrix is modes x Ulysses x ring sizes of 1 to 8 ranks x heads x documents x window x kernel; lengths, chunks of the
heads, and who holds what (as a run chooses, or parts dealt at random) alternate along it. A run takes a seeded sample;
with MEGASP_FULL_MATRIX=1 all of it.
"""

import itertools
import os
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasp import parallel_state
from megasp.config.heads import most_chunks
from megasp.config.layout import Layout
from megasp.parallel_state import ParallelState, Traffic
from megasp.sequence_parallel import Mask, SequenceAttention
from megasp.sequence_parallel.shards import Shards, shards
from megasp.sequence_parallel.traffic import AttentionShape, ring_traffic, ulysses_traffic
from megasp.shard_map import ShardMap
from tests.ranks import run_ranks
from tests.reference_attention import attention, visible

FULL_MATRIX = os.environ.get("MEGASP_FULL_MATRIX") == "1"
TOLERANCE = 1e-12
HEAD_DIM, SAMPLES = 8, 2


class Case(NamedTuple):
    mode: str
    ulysses: int
    ring: int
    heads: tuple[int, int]
    documents: str
    mask: Mask
    kernel: str
    each: int  # tokens of a rank
    chunks: int  # of the heads, under Ulysses
    dealt: bool  # parts of the sequence are with ranks at random


def matrix(world_size: int) -> list[Case]:
    sizes = [(u, world_size // u) for u in range(1, world_size + 1) if world_size % u == 0]
    heads = [(8, 8), (8, 2), (8, 1), (6, 2), (7, 7)]
    masks = [Mask(), Mask(0), Mask(3), Mask(7, 2), Mask(1000)]
    product = itertools.product(
        ("p2p", "lightseq", "all_gather"), sizes, heads, ("none", "random", "adversarial"), masks, ("flash", "unfused")
    )
    lengths, chunks, dealt = (itertools.cycle(some) for some in ((1, 5, 6), (1, 2, 1, 3, 4), (False, True)))
    return [
        Case(mode, u, r, n, documents, mask, kernel, each, min(cut, most_chunks(*n, u, r > 1)) if u > 1 else 1, deal)
        for (mode, (u, r), n, documents, mask, kernel), each, cut, deal in zip(
            product, lengths, chunks, dealt, strict=False
        )
        if u <= n[0]
    ]


def documents_of(case: Case, length: int) -> list[np.ndarray] | None:
    """Where documents begin in each sample. Adversarial: one token each at the shards' borders, then one that crosses
    all the others; and a sample that is one document."""
    if case.documents == "none":
        return None
    if case.documents == "random":
        draws = random.Random(str(case))
        starts = [{draws.randrange(length) for _ in range(draws.randrange(7))} for _ in range(SAMPLES)]
        return [np.array(sorted({0, *some})) for some in starts]
    border = length // (case.ulysses * case.ring)
    return [np.array(sorted({0, 1 % length, border - 1, border % length, min(border + 1, length - 1)})), np.array([0])]


def shards_of(case: Case, length: int) -> Shards:
    parts = 2 * case.ring
    if case.dealt and length % parts == 0:
        draws = random.Random(str(case))
        return ShardMap.balanced(length, case.ring, case.ulysses, [draws.random() for _ in range(parts)])
    return shards(length, case.ring, case.ulysses, case.mode, case.mask)


def difference(case: Case, state: ParallelState) -> dict[str, float]:
    """Largest error of this rank's out and gradients, and bytes sent besides the closed forms (zero)."""
    n, g = case.heads
    length = case.each * case.ulysses * case.ring
    generator = torch.Generator().manual_seed(length)
    q, k, v, dout = (
        torch.randn(length, SAMPLES, heads, HEAD_DIM, generator=generator).double() for heads in (n, g, g, n)
    )
    documents = documents_of(case, length)
    seen = torch.stack([visible(length, case.mask, starts) for starts in documents or [np.array([0])] * SAMPLES])
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = attention(*whole, seen)
    want.backward(dout)
    held = shards_of(case, length)
    here = torch.as_tensor(held.of(documents).positions(state.cp.rank))
    mine = [x[here].requires_grad_() for x in (q, k, v)]
    attend = SequenceAttention(state, held, case.kernel, case.mode, case.mask, case.chunks)
    work = attend.work(case.each, n, g, documents)
    for axis in (state.ulysses, state.ring):
        axis.traffic.reset()
    out = attend(*mine, work)
    out.backward(dout[here])
    found = {"out": float((out - want[here]).abs().max())}
    for name, part, full in zip(("dq", "dk", "dv"), mine, whole, strict=True):
        assert part.grad is not None and full.grad is not None
        found[name] = float((part.grad - full.grad[here]).abs().max())
    return found | {"unexplained": float(unexplained_bytes(case, state, work))}


def unexplained_bytes(case: Case, state: ParallelState, work: Any) -> int:
    shape = AttentionShape(case.each, SAMPLES, *case.heads, HEAD_DIM, torch.float64)
    ulysses = state.ulysses
    formulas = {
        "ulysses": ulysses_traffic(shape, ulysses.size, ulysses.rank, case.chunks),
        "ring": ring_traffic(shape, work, ulysses.size, ulysses.rank, state.ring.rank, case.chunks),
    }
    wrong = 0
    for axis, directions in formulas.items():
        total = Traffic()
        for direction in directions:
            total.add_all(direction)
        wrong += abs(state.axes[axis].traffic.total_bytes - total.total_bytes)
        wrong += abs(state.axes[axis].traffic.total_calls - total.total_calls)
    return wrong


def differences(cases: list[Case]) -> list[dict[str, float]]:
    states: dict[tuple[int, int], ParallelState] = {}
    for case in cases:
        if (case.ulysses, case.ring) not in states:
            layout = Layout(ulysses=case.ulysses, ring=case.ring)
            states[case.ulysses, case.ring] = parallel_state.build(layout, torch.device("cpu"))
    return [difference(case, states[case.ulysses, case.ring]) for case in cases]


def check(world_size: int, cases: list[Case]) -> None:
    by_rank = run_ranks(differences, world_size, cases, timeout=1200)
    for case, of_ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        worst = {name: max(found[name] for found in of_ranks) for name in of_ranks[0]}
        assert max(worst.values()) < TOLERANCE, (case, worst)


@pytest.mark.skipif(FULL_MATRIX, reason="the whole matrix runs")
@pytest.mark.parametrize("world_size", range(1, 9))
@settings(max_examples=1, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sample_of_all_modes(world_size: int, data: st.DataObject) -> None:
    """Hypothesis draws the cases; ranks are started once for all of them."""
    chooser = data.draw(st.randoms(use_true_random=False))
    check(world_size, chooser.sample(matrix(world_size), 24))


@pytest.mark.skipif(not FULL_MATRIX, reason="takes long; MEGASP_FULL_MATRIX=1 runs it")
@pytest.mark.parametrize("world_size", range(1, 9))
def test_all_modes(world_size: int) -> None:
    check(world_size, matrix(world_size))
