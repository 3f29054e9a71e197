"""Attention kernels on a CPU against plain mathematics: out, lse and gradients, grouped queries, dropout."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.errors import ConfigError
from megasp.model.dropout import attention_bits
from megasp.sequence_parallel import attend, kernels
from megasp.sequence_parallel.block_kernels import AttentionDropout
from megasp.sequence_parallel.blocks import CAUSAL, Block

BACKENDS = ["unfused", "flash"]
SHAPES = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
S, B, H = 9, 2, 8


def inputs(heads: int, kv_heads: int, length: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(length, B, n, H, generator=generator, dtype=torch.float64).to(dtype) for n in counts]


def plain(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None, factors: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """out and lse as the textbook has them, differentiable."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("sbnh,tbnh->bnst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.einsum("bnst,tbnh->sbnh", scores.softmax(-1) * factors, v), scores.logsumexp(-1)


def run(function: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_plain(backend: str, shape: str, causal: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        given = inputs(*SHAPES[shape], dtype=dtype)
        ours = run(partial(attend, backend=backend, causal=causal), *given)
        torch.testing.assert_close(ours, run(partial(plain, causal=causal), *given))
        assert ours[1].shape == (B, SHAPES[shape][0], S)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend: str) -> None:
    given = inputs(6, 2, 64, torch.bfloat16)
    ours, exact = run(partial(attend, backend=backend), *given), run(plain, *(x.double() for x in given))
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3, "lse stays wide"
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.01, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend: str) -> None:
    given = inputs(4, 2)
    torch.testing.assert_close(
        run(partial(attend, backend=backend, scale=0.3), *given), run(partial(plain, scale=0.3), *given)
    )
    for scale in (0.0, -1.0, math.nan):  # of which kernels make NaN
        with pytest.raises(ConfigError, match=f"scale {scale}: .* positive"):
            attend(*given[:3], backend=backend, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    """exp(1000) is not a number of fp32: the maximum must be taken out first."""
    q, k, v, dout = inputs(2, 2, dtype=torch.float32)
    for x in run(partial(attend, backend=backend), 100 * q, 100 * k, v, dout):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """q, k, v as the model has them: slices of one fused tensor; and the gradient of a transposed output."""
    q, k, v, dout = inputs(4, 2)
    fused = torch.cat((q, k, v), 2)
    ours = run(
        partial(attend, backend=backend), *fused.split([4, 2, 2], 2), dout.transpose(0, 1).contiguous().transpose(0, 1)
    )
    torch.testing.assert_close(ours, run(plain, q, k, v, dout))


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129])
def test_lengths(length: int) -> None:
    """Around the block sizes of the flash kernel."""
    given = inputs(2, 1, length)
    torch.testing.assert_close(run(partial(attend, backend="flash"), *given), run(plain, *given))


def test_future_is_not_seen() -> None:
    for backend in BACKENDS:
        q, k, v, _ = inputs(2, 2)
        before = attend(q, k, v, backend=backend)[0][:5]
        k[5:], v[5:] = 1e3, -1e3
        assert torch.equal(attend(q, k, v, backend=backend)[0][:5], before), backend


def test_gradcheck_unfused() -> None:
    q, k, v, _ = (x[:4, :1, :, :3].contiguous().requires_grad_() for x in inputs(4, 2))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, backend="unfused")[0], (q, k, v))


# Dropout


def attention_dropout(probability: float, first_head: int = 0, key: int = 11) -> AttentionDropout:
    return AttentionDropout(probability, partial(attention_bits, key), torch.tensor([3, 8]), first_head)


def test_dropout_against_plain() -> None:
    given, drop = inputs(6, 2), attention_dropout(0.4)
    factors = drop.factors(Block(None, (0, S), (0, S), CAUSAL, 0, 0), 6)
    ours = run(partial(attend, dropout=drop), *given)
    torch.testing.assert_close(ours, run(partial(plain, factors=factors), *given))
    assert not torch.allclose(ours[0], plain(*given[:3])[0]), "nothing was dropped"
    torch.testing.assert_close(ours[1], plain(*given[:3])[1], msg="lse is of the scores, before dropout")


def test_dropout_statistics() -> None:
    for probability in (0.1, 0.5):
        factors = attention_dropout(probability).factors(Block(None, (0, 32), (0, 32), CAUSAL, 0, 0), 16)
        assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / (1 - probability)).item()}
        assert abs((factors == 0).double().mean() - probability) < 0.01
        assert abs(factors.double().mean() - 1) < 0.02


def test_dropout_of_some_heads() -> None:
    """A rank that holds heads 2 and 3 drops what the whole does there; two runs drop the same."""
    q, k, v, _ = inputs(4, 2)
    whole = attend(q, k, v, dropout=attention_dropout(0.4))[0]
    part = attend(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], dropout=attention_dropout(0.4).for_heads(2))[0]
    assert torch.equal(part, whole[:, :, 2:]) and torch.equal(whole, attend(q, k, v, dropout=attention_dropout(0.4))[0])
    assert attention_dropout(0.4, 2).for_heads(3).first_head == 5


def test_dropout_needs_the_exact_kernel() -> None:
    q, k, v, _ = inputs(2, 2)
    with pytest.raises(ConfigError, match="--attention-backend flash: flash: it has no attention dropout"):
        attend(q, k, v, backend="flash", dropout=attention_dropout(0.4))
    assert attend(q, k, v, backend="flash", dropout=attention_dropout(0.0))[0].shape == q.shape


# Registry


def test_choice_and_availability() -> None:
    assert kernels.choose("auto", "cpu", torch.bfloat16) == "flash"
    assert kernels.choose("auto", "cpu", torch.float64, dropout=0.1) == "unfused"
    with pytest.raises(ConfigError, match="--attention-backend fused: fused: it runs on cuda, not on cpu"):
        kernels.choose("fused", "cpu", torch.bfloat16)
    had = {name: has for name, has, _ in kernels.available()}
    assert had["flash"] and had["unfused"] and had["fused"] == torch.cuda.is_available()


def test_lse_is_not_differentiated() -> None:
    q, k, v, _ = (x.requires_grad_() for x in inputs(2, 2))
    assert not attend(q, k, v)[1].requires_grad
