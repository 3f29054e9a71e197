"""The fused head and cross entropy against F.cross_entropy on whole logits: loss and gradients, in chunks, masked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.model import loss as module
from megasp.model.layers import ONE_RANK
from megasp.model.loss import linear_cross_entropy

S, B, D, V = 7, 2, 6, 11


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, mask."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (S, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) > 0.4).float()
    return hidden.to(dtype), weight.to(dtype), labels, mask


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, mask, ONE_RANK)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).flatten(0, 1)
    return (F.cross_entropy(logits, labels.flatten(), reduction="none") * mask.flatten()).sum()


def run(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rest: Any, scale: float = 1.0
) -> list[Tensor]:
    """Loss, and its gradients as a step takes them: of the loss divided by the number of tokens."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, *rest)
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


def rows_per_chunk(rows: int, itemsize: int = 8) -> int:
    return rows * V * itemsize


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 14, 1000])
def test_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of the logits exists at a time, also where the last chunk is smaller."""
    calls = []
    original = module._chunk_loss
    monkeypatch.setattr(module, "_chunk_loss", lambda *args: calls.append(len(args[0])) or original(*args))
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_per_chunk(rows))
    torch.testing.assert_close(run(ours, *inputs(), scale=0.3), run(whole, *inputs(), scale=0.3))
    assert sum(calls) == S * B and max(calls) == min(rows, S * B)


def test_a_chunk_smaller_than_a_row_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(run(ours, *inputs()), run(whole, *inputs()))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_mask_types(mask_type: torch.dtype) -> None:
    hidden, weight, labels, mask = inputs()
    given = (hidden, weight, labels, mask.to(mask_type))
    torch.testing.assert_close(run(ours, *given), run(whole, *inputs()))


def test_masked_tokens_give_no_gradient() -> None:
    hidden, weight, labels, mask = inputs()
    labels = labels.masked_fill(mask == 0, -100)  # what a masked label is does not matter
    loss, dhidden, _ = run(ours, hidden, weight, labels, mask)
    assert (dhidden[mask == 0] == 0).all() and (dhidden[mask == 1] != 0).all()
    torch.testing.assert_close(loss, whole(*inputs()))


def test_all_masked_is_zero() -> None:
    hidden, weight, labels, mask = inputs()
    for value in run(ours, hidden, weight, labels, torch.zeros_like(mask)):
        assert (value == 0).all(), "0, not NaN"


def test_fractional_weights() -> None:
    hidden, weight, labels, mask = inputs()
    given = (hidden, weight, labels, mask * 0.25 + 0.5)
    torch.testing.assert_close(run(ours, *given), run(whole, *given))


def test_large_logits() -> None:
    """Logits of some thousands: finite, and as right as fp32 products of that size are (some 2e-4)."""
    given = inputs(torch.float32, scale=1000.0)
    got = run(ours, *given)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got, run(whole, *given), rtol=1e-3, atol=5e-2)


def test_equal_logits() -> None:
    hidden, weight, labels, _ = inputs()
    loss = ours(torch.zeros_like(hidden), weight, labels, torch.ones(S, B))
    torch.testing.assert_close(loss, S * B * torch.tensor(V, dtype=torch.float64).log())


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 in, fp32 loss, bf16 gradients; the weight's gradient is summed over chunks in fp32."""
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_per_chunk(2, 4))
    given = inputs(torch.bfloat16)
    got, exact = run(ours, *given), run(whole, *(x.double() for x in given[:2]), *given[2:])
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for name, a, b in zip(("loss", "dhidden", "dweight"), got, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.01, name


@pytest.mark.parametrize("rows", [2, S * B])
def test_fp16(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The weight's gradient summed over rows, of several chunks or of one, exceeds fp16's 65504 until the loss's
    divisor is applied."""
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_per_chunk(rows, 2))
    hidden, weight, labels, mask = inputs(torch.float16)
    given = (hidden.abs() * 2**13, weight * 2**-13, torch.zeros_like(labels), torch.ones_like(mask))
    exact = run(whole, *(x.double() for x in given[:2]), *given[2:], scale=2.0**-12)[2]
    assert (exact * 2**12).abs().max() > 65504, "this test shows nothing here"
    got = run(ours, *given, scale=2.0**-12)[2]
    assert got.dtype == torch.float16 and (got.double() - exact).norm() / exact.norm() < 0.01


def test_evaluation_keeps_nothing() -> None:
    hidden, weight, labels, mask = inputs()
    with torch.no_grad():
        loss = ours(hidden.requires_grad_(), weight.requires_grad_(), labels, mask)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole(*inputs()))


def test_differentiated_once() -> None:
    """The gradients are kept in place of the logits and are scaled in place: a second backward must not pass."""
    hidden, weight, labels, mask = inputs()
    loss = ours(hidden.requires_grad_(), weight.requires_grad_(), labels, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_frozen_head() -> None:
    hidden, weight, labels, mask = inputs()
    (dhidden,) = torch.autograd.grad(ours(hidden.requires_grad_(), weight, labels, mask), hidden)
    torch.testing.assert_close(dhidden, run(whole, *inputs())[1])


def test_strided_labels() -> None:
    """The model hands over transposes."""
    hidden, weight, labels, mask = inputs()
    given = (hidden, weight, labels.t().contiguous().t(), mask.t().contiguous().t())
    torch.testing.assert_close(run(ours, *given), run(whole, *inputs()))
