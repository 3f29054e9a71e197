"""Collectives on real ranks: each pair's forward and backward by its closed form, and what they count as sent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import collectives, parallel_state
from megasp.collectives import copy_to, gather_from, reduce_from, scatter_to
from megasp.config.layout import Layout
from megasp.parallel_state import Axis
from tests.ranks import run_ranks

ROWS, COLUMNS = 8, 3
PAIRS = {f.__name__: f for f in (copy_to, reduce_from, gather_from, scatter_to)}


def values(rank: int, kind: str, rows: int = ROWS) -> Tensor:
    """What rank `rank` puts in; anyone can compute it."""
    seed = rank * 2 + (kind == "gradient")
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(pair: str, size: int, rank: int) -> tuple[Tensor, Tensor, dict[str, tuple[int, int]]]:
    """Output, input gradient, and operation -> (calls, bytes) of a forward and a backward."""
    each = ROWS // size
    xs = [values(r, "input") for r in range(size)]
    block = slice(rank * each, (rank + 1) * each)
    out_rows = {"gather_from": ROWS * size, "scatter_to": each}.get(pair, ROWS)
    gs = [values(r, "gradient", out_rows) for r in range(size)]
    nbytes = ROWS * COLUMNS * 8
    all_reduce = {"all_reduce": (1, 2 * nbytes * (size - 1) // size)}
    if pair == "copy_to":
        return xs[rank], sum(gs), all_reduce  # type: ignore[return-value]
    if pair == "reduce_from":
        return sum(xs), gs[rank], all_reduce  # type: ignore[return-value]
    if pair == "gather_from":
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        sent = {"all_gather": (1, nbytes * (size - 1)), "reduce_scatter": (1, nbytes * (size - 1))}
        return torch.cat(xs), sum(gs)[own], sent  # type: ignore[index]
    assert pair == "scatter_to"
    shard = nbytes // size * (size - 1)
    return sum(xs)[block], torch.cat(gs), {"reduce_scatter": (1, shard), "all_gather": (1, shard)}  # type: ignore[index]


def _pairs(name: str) -> None:
    state = parallel_state.build(Layout.parse(name), torch.device("cpu"))
    axis = state.tp
    for pair, function in PAIRS.items():
        axis.traffic.reset()
        x = values(axis.rank, "input").requires_grad_()
        y = function(x, axis)
        kept = y.detach().clone()
        g = values(axis.rank, "gradient", len(y))
        (dx,) = torch.autograd.grad(y, x, g)
        want_y, want_dx, sent = expected(pair, axis.size, axis.rank)
        torch.testing.assert_close(kept, want_y, msg=lambda text, pair=pair: f"{pair} forward: {text}")
        torch.testing.assert_close(dx, want_dx, msg=lambda text, pair=pair: f"{pair} backward: {text}")
        assert torch.equal(x, values(axis.rank, "input")), f"{pair} changed its input"
        assert torch.equal(g, values(axis.rank, "gradient", len(y))), f"{pair} changed the gradient"
        assert {k: (axis.traffic.calls[k], axis.traffic.bytes_sent[k]) for k in axis.traffic.calls} == sent, pair
    others = [a for a in state.axes.values() if a.name != "tp" and a.size == 1]
    assert others and all(other.traffic.total_calls == 0 for other in others)


@pytest.mark.parametrize("name", ["tp2", "tp4", "tp2-dp2"])
def test_pairs(name: str) -> None:
    run_ranks(_pairs, Layout.parse(name).world_size, name)


def _every_start_from_strided_inputs() -> None:
    """Transposed inputs, asynchronous starts, and gradients that are not contiguous."""
    axis = parallel_state.build(Layout.parse("tp4"), torch.device("cpu")).tp
    x = values(axis.rank, "input").t().contiguous().t()
    assert not x.is_contiguous()
    pending: list[tuple[str, Any]] = [
        ("gather_from", collectives.start_all_gather(x, axis)),
        ("scatter_to", collectives.start_reduce_scatter(x, axis)),
    ]
    for pair, handle in reversed(pending):  # waited for in another order
        torch.testing.assert_close(handle.wait(), expected(pair, 4, axis.rank)[0])
        assert handle.wait() is handle.wait(), "waiting again gives the same"
    for pair, function in PAIRS.items():
        leaf = values(axis.rank, "input").requires_grad_()
        y = function(leaf, axis)
        g = values(axis.rank, "gradient", len(y)).t().contiguous().t()
        torch.testing.assert_close(torch.autograd.grad(y, leaf, g)[0], expected(pair, 4, axis.rank)[1])


def test_strided_inputs() -> None:
    run_ranks(_every_start_from_strided_inputs, 4)


def _all_to_all() -> None:
    """Two tensors for each rank, of sizes that depend on both ends, from strided places into strided places."""
    axis = parallel_state.build(Layout.parse("tp4"), torch.device("cpu")).tp

    def message(source: int, target: int) -> list[Tensor]:
        flat = torch.arange(6.0) + 100 * source + 10 * target
        return [flat[: 1 + source + target][None], flat.view(2, 3)]

    def place(x: Tensor) -> Tensor:
        """Of this shape, every second element of its storage."""
        return torch.zeros(*x.shape, 2)[..., 0]

    sends = [[place(x).copy_(x) for x in message(axis.rank, target)] for target in range(4)]
    receives = [[place(x) for x in message(source, axis.rank)] for source in range(4)]
    pending = collectives.start_all_to_all(sends, receives, axis)
    pending.wait()
    for source, got in enumerate(receives):
        torch.testing.assert_close(got, message(source, axis.rank))
    sent = sum(x.nbytes for target in range(4) if target != axis.rank for x in message(axis.rank, target))
    assert (axis.traffic.calls, axis.traffic.bytes_sent) == ({"all_to_all": 1}, {"all_to_all": sent})


def test_all_to_all() -> None:
    run_ranks(_all_to_all, 4)


def _low_precision_sum() -> float:
    """256 + 1 + 1 + 1: bf16 holds every integer to 256 and then even ones, so a running bf16 sum stays at 256."""
    axis = parallel_state.build(Layout.parse("tp4"), torch.device("cpu")).tp
    x = torch.full((4,), 256.0 if axis.rank == 0 else 1.0, dtype=torch.bfloat16)
    total = collectives.start_reduce_scatter(x, axis).wait()
    assert total.dtype == torch.bfloat16 and total.shape == (1,)
    return total.item()


def test_reduce_scatter_sums_bf16_in_fp32() -> None:
    assert run_ranks(_low_precision_sum, 4) == [260.0] * 4, "259 rounds to 260, not to 256"


def _in_place() -> None:
    import torch.distributed as dist

    axis = parallel_state.build(Layout.parse("tp2"), torch.device("cpu")).tp
    x = torch.tensor([axis.rank + 1.0])
    assert collectives.all_reduce_(x, axis) is x and x.item() == 3
    assert collectives.all_reduce_(torch.tensor([float(axis.rank)]), axis, dist.ReduceOp.MAX).item() == 1
    y = torch.ones(6)
    assert collectives.start_all_reduce(y, axis).wait() is y and y.sum() == 12
    assert axis.traffic.bytes_sent == {"all_reduce": 4 + 4 + 24}


def test_in_place() -> None:
    run_ranks(_in_place, 2)


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
def test_one_rank_is_the_identity(function: Callable[[Tensor, Axis], Tensor]) -> None:
    """No graph node, no copy, nothing counted, no process group needed."""
    axis, x = Axis("tp"), torch.randn(4, 2, requires_grad=True)
    assert function(x, axis) is x and axis.traffic.total_calls == 0


def test_one_rank_starts_are_the_identity() -> None:
    axis, x = Axis("tp"), torch.randn(4, 2)
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        assert getattr(collectives, f"start_{name}")(x, axis).wait() is x
    assert collectives.all_reduce_(x, axis) is x and axis.traffic.total_calls == 0
