"""The closed forms of what is sent reduce to the table of docs/context_parallel.md: dense, causal, even heads."""

from fractions import Fraction

import pytest
import torch

from megasp.parallel_state import Axis, ParallelState, Traffic
from megasp.sequence_parallel import SequenceAttention
from megasp.sequence_parallel.shards import shards
from megasp.sequence_parallel.traffic import AttentionShape, ring_traffic, ulysses_traffic

C, SAMPLES, HEAD_DIM, ITEM, WIDE = 8, 3, 16, 2, 4  # tokens of a rank, bf16, fp32


def sent(mode: str, ulysses: int, ring: int, heads: int, kv_heads: int, chunks: int = 1) -> tuple[Fraction, Fraction]:
    """Bytes of (forward, backward), mean over the ranks."""
    shape, total = AttentionShape(C, SAMPLES, heads, kv_heads, HEAD_DIM, torch.bfloat16), [Traffic(), Traffic()]
    held = shards(C * ulysses * ring, ring, ulysses, mode)
    for u in range(ulysses):
        state = ParallelState.single()
        state.axes.update(ulysses=Axis("ulysses", ulysses, u), ring=Axis("ring", ring, 0))
        work = SequenceAttention(state, held, comm=mode, chunks=chunks).work(C, heads, kv_heads)
        for r in range(ring):
            of_rank = ring_traffic(shape, work, ulysses, u, r, chunks), ulysses_traffic(shape, ulysses, u, chunks)
            for direction, *parts in zip(total, *of_rank, strict=True):
                for part in parts:
                    direction.add_all(part)
    forward, backward = (Fraction(direction.total_bytes, ulysses * ring) for direction in total)
    return forward, backward


def row_of_ulysses(ranks: int, heads: int, kv_heads: int, tokens: int = C) -> int:
    copies = max(1, ranks // kv_heads)
    return (ranks - 1) * tokens * SAMPLES * (2 * heads + 2 * copies * kv_heads) * HEAD_DIM * ITEM // ranks


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (16, 8), (16, 2), (16, 1)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses(ranks: int, heads: int, kv_heads: int, chunks: int) -> None:
    assert sent("p2p", ranks, 1, heads, kv_heads, chunks) == (row_of_ulysses(ranks, heads, kv_heads),) * 2


@pytest.mark.parametrize("mode", ["p2p", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ring_and_all_gather(mode: str, ranks: int) -> None:
    hop = (ranks - 1) * C * SAMPLES * 2 * 4 * HEAD_DIM
    assert sent(mode, 1, ranks, 16, 4) == (hop * ITEM, hop * (ITEM + WIDE))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_lightseq(ranks: int) -> None:
    rows, q, kv = C * SAMPLES, 16 * HEAD_DIM, 2 * 4 * HEAD_DIM
    m, h, lse = Fraction(3 * ranks, 8) - Fraction(1, 4), Fraction(ranks, 8) - Fraction(1, 4), 16 * WIDE
    forward = rows * (m * kv * ITEM + h * (2 * q * ITEM + lse))
    backward = rows * (m * kv * (ITEM + WIDE) + h * (q * (3 * ITEM + WIDE) + lse))
    assert sent("lightseq", 1, ranks, 16, 4) == (forward, backward)


@pytest.mark.parametrize("chunks", [1, 2])
def test_both(chunks: int) -> None:
    ulysses, ring, heads, kv_heads = 2, 4, 16, 4
    exchange = row_of_ulysses(ulysses, heads, kv_heads)
    hop = (ring - 1) * C * ulysses * SAMPLES * 2 * (kv_heads // ulysses) * HEAD_DIM
    assert sent("p2p", ulysses, ring, heads, kv_heads, chunks) == (
        exchange + hop * ITEM,
        exchange + hop * (ITEM + WIDE),
    )
