"""Ulysses on real ranks against attention over the whole sequence: out, dq, dk, dv, and what is sent."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import parallel_state
from megasp.collectives import start_all_to_all
from megasp.config.layout import Layout
from megasp.model.dropout import attention_bits
from megasp.parallel_state import Axis
from megasp.sequence_parallel import SparseMask, UlyssesAttention, attend, sparse_attend, ulysses
from megasp.sequence_parallel.block_kernels import AttentionDropout
from tests.ranks import run_ranks

S, B, H = 8, 2, 4
HEADS = {"mha": (8, 8), "gqa": (8, 4), "gqa, kv fewer than 4 ranks": (8, 2), "mqa": (4, 1), "uneven groups": (12, 4)}


def inputs(heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and a gradient of the output, over the whole sequence."""
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(S, B, n, H, generator=generator, dtype=torch.float64) for n in counts]


def run(attention: Any, given: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = attention(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def check(
    axis: Axis,
    attention: Any,
    heads: tuple[int, int],
    local: dict[str, Any],
    whole: dict[str, Any],
    chunks: int = 1,
) -> None:
    given = inputs(*heads)
    axis.traffic.reset()
    ours = run(UlyssesAttention(attention, axis, chunks), [x.chunk(axis.size)[axis.rank] for x in given], **local)
    for name, got, want in zip(("out", "dq", "dk", "dv"), ours, run(attention, given, **whole), strict=True):
        want = want.chunk(axis.size)[axis.rank]
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name} of {heads}: {text}")
    # f c b (2 dq + 2 r dkv) a direction: c local tokens, r copies of each kv head.
    copies = math.ceil(axis.size / heads[1])
    tokens = B * S // axis.size
    width = 2 * heads[0] * H + 2 * copies * heads[1] * H
    sent = tokens * 8 * width * (axis.size - 1) // axis.size
    assert axis.traffic.calls == {"all_to_all": 4 * chunks}, "two exchanges forward, two backward, of each chunk"
    assert axis.traffic.bytes_sent == {"all_to_all": 2 * sent}, heads


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, power: int) -> tuple[Tensor, None]:
    """Some attention that nobody here knows: no softmax, not causal, an option of its own."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("sbnh,tbnh->bnst", q, k) ** power
    return torch.einsum("bnst,tbnh->sbnh", scores, v), None


def by_head(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & ((query == key) | (key % 5 == head % 5))


def ignores_k(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return q * v.mean(0).repeat_interleave(q.shape[2] // v.shape[2], 1) + 0 * k.sum(), None


def _on_ranks(name: str) -> None:
    axis = parallel_state.build(Layout.parse(name), torch.device("cpu")).ulysses
    for heads in HEADS.values():
        for causal in (True, False):
            check(axis, attend, heads, {"causal": causal}, {"causal": causal})
        check(axis, partial(attend, backend="unfused"), heads, {"scale": 0.2}, {"scale": 0.2})
        check(axis, linear_attention, heads, {"power": 3}, {"power": 3})
        check(axis, ignores_k, heads, {}, {})
        dropout = {"dropout": AttentionDropout(0.4, partial(attention_bits, 5), torch.tensor([2, 9]), first_head=16)}
        check(axis, attend, heads, dropout, dropout)  # every rank drops what the whole does for its heads
        sparse = {"mask": SparseMask(by_head, 4)}
        check(axis, sparse_attend, heads, sparse, sparse)
        for chunks in range(2, heads[0] // axis.size + 1):
            check(axis, sparse_attend, heads, sparse, sparse, chunks)
            check(axis, attend, heads, dropout, dropout, chunks)
            check(axis, linear_attention, heads, {"power": 3}, {"power": 3}, chunks)
            check(axis, ignores_k, heads, {}, {}, chunks)


@pytest.mark.parametrize("name", ["u2", "u4", "u2-tp2"])
def test_on_ranks(name: str) -> None:
    run_ranks(_on_ranks, Layout.parse(name).world_size, name)


def _overlap() -> list[str]:
    """What rank 0 does in three chunks, in order."""
    axis = parallel_state.build(Layout.parse("u2"), torch.device("cpu")).ulysses
    done: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):  # type: ignore[no-untyped-def]
            done.append("attend")
            return q.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            done.append("backward")
            return grad

    def watched(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return Watched.apply(q + 0 * (k + v).sum()), None

    def start(sends: Any, receives: Any, axis: Axis) -> Any:
        done.append("start")
        pending = start_all_to_all(sends, receives, axis)

        class Pending:
            def wait(self) -> None:
                done.append("wait")
                pending.wait()

        return Pending()

    ulysses.start_all_to_all = start  # type: ignore[assignment]
    run(UlyssesAttention(watched, axis, 3), [x.chunk(2)[axis.rank] for x in inputs(6, 6)])
    return done


def test_exchanges_overlap_the_chunk_before() -> None:
    """Each attention, forward and backward, runs while the exchanges of its neighbours are on their way."""
    forward = "start start wait attend start start wait attend start wait attend start wait wait wait"
    backward = "start start start wait backward start wait backward start wait wait backward start wait wait"
    assert run_ranks(_overlap, 2) == [f"{forward} {backward}".split()] * 2


def _forward_alone() -> dict[str, int]:
    axis = parallel_state.build(Layout.parse("u2"), torch.device("cpu")).ulysses
    q, k, v, _ = (x.chunk(2)[axis.rank] for x in inputs(8, 4))
    with torch.no_grad():
        out = UlyssesAttention(attend, axis)(q, k, v)
    assert out.shape == q.shape
    return axis.traffic.calls


def test_forward_is_two_exchanges() -> None:
    assert run_ranks(_forward_alone, 2) == [{"all_to_all": 2}] * 2


def test_one_rank_is_the_attention_itself() -> None:
    q, k, v, _ = inputs(8, 4)
    axis = Axis("ulysses")
    assert torch.equal(UlyssesAttention(attend, axis)(q, k, v, causal=False), attend(q, k, v, causal=False)[0])
    assert axis.traffic.total_calls == 0
