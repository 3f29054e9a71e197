"""The flash-attn packages are called as they are written: stand-ins with their functions' parameters, which compute the
exact mathematics sequence by sequence, give what the CPU's kernel gives. No such package runs without a GPU."""

import importlib.util
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megasp.sequence_parallel import Mask, Work, attend, kernels
from megasp.sequence_parallel.block_kernels import Options, Unfused
from megasp.sequence_parallel.blocks import CAUSAL, FULL, Block
from megasp.sequence_parallel.cuda_kernels import FlashAttention2, FlashAttention3
from megasp.sequence_parallel.kernels import KERNELS

DOCUMENTS = [np.array([0, 1, 2, 17, 30, 31]), np.array([0, 9])]


class StandIn:
    """Attention of sequences that lie one after another in [T, heads, H], or of samples [B, S, heads, H]."""

    def __init__(self) -> None:
        self.calls = {"samples": 0, "varlen": 0}

    def sequences(
        self, q: Tensor, k: Tensor, ends: tuple[Tensor, Tensor] | None, longest: tuple[int, int] | None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Index of each sequence in q, in k and in the lse."""
        assert q.stride(-1) == k.stride(-1) == 1
        if ends is None or longest is None:
            self.calls["samples"] += 1
            yield from ((sample, sample, (sample,)) for sample in range(q.shape[0]))
            return
        self.calls["varlen"] += 1
        for x, end, most in zip((q, k), ends, longest, strict=True):
            assert end.dtype == torch.int32 and end[0] == 0 and end[-1] == x.shape[0] and end.is_contiguous()
            assert int(end.diff().max()) == most and int(end.diff().min()) > 0
        for rows, columns in zip(*(pairwise(end.tolist()) for end in ends), strict=True):
            yield slice(*rows), slice(*columns), (slice(None), slice(*rows))

    @staticmethod
    def one(*tensors: Tensor) -> list[Tensor]:
        """[S, heads, H] -> [1, heads, S, H]."""
        return [x.transpose(0, 1)[None] for x in tensors]

    @staticmethod
    def block(queries: int, keys: int, causal: bool) -> Block:
        assert queries == keys or not causal, "versions differ on where the diagonal is"
        return Block(None, (0, queries), (0, keys), CAUSAL if causal else FULL, 0, 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *lengths: Any) -> tuple[Tensor, ...]:
        out = torch.full_like(q, torch.nan)
        lse = q.new_full((q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1]), torch.nan)
        for rows, columns, place in self.sequences(q, k, *(lengths or (None, None))):
            block = self.block(len(q[rows]), len(k[columns]), causal)
            part, part_lse = Unfused().forward(*self.one(q[rows], k[columns], v[columns]), block, Options(scale))
            out[rows], lse[place] = part[0].transpose(0, 1), part_lse[0]
        return out, lse, q.new_empty(0), q.new_empty(0)

    def backward(self, tensors: Any, gradients: Any, scale: float, causal: bool, *lengths: Any) -> Tensor:
        dout, q, k, v, out, lse = tensors
        assert lse.is_contiguous() and not any(x.isnan().any() for x in tensors)
        for rows, columns, place in self.sequences(q, k, *(lengths or (None, None))):
            block = self.block(len(q[rows]), len(k[columns]), causal)
            one = self.one(dout[rows], q[rows], k[columns], v[columns], out[rows])
            found = Unfused().backward(*one, lse[place][None], block, Options(scale))
            for whole, part, at in zip(gradients, found, (rows, columns, columns), strict=True):
                whole[at] = part[0].transpose(0, 1)
        return lse


def flash_attn_2(math: StandIn) -> dict[str, ModuleType]:
    """The functions of flash_attn 2.7 and 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
        return math.forward(q, k, v, softmax_scale, causal)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, deterministic) == (0.0, -1, -1, 0.0, False)
        return math.backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), softmax_scale, causal)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
        lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return math.forward(q, k, v, softmax_scale, causal, *lengths)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, deterministic) == (0.0, -1, -1, 0.0, False)
        lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return math.backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), softmax_scale, causal, *lengths)

    for function in (
        _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.flash_attn_interface": module}


def flash_attn_3(math: StandIn) -> dict[str, ModuleType]:
    """The functions of flash-attn-3; those of its parameters that are used."""
    module = ModuleType("flash_attn_interface")

    def lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return ((cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)) if cu_seqlens_q is not None else ()

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        *, softmax_scale=None, causal=False,
    ):  # fmt: skip
        given = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return math.forward(q, k, v, softmax_scale, causal, *given)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    ):  # fmt: skip
        given = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return math.backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), softmax_scale, is_causal, *given)

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return {"flash_attn_interface": module}


PACKAGES = {"flash-attn-2": (flash_attn_2, FlashAttention2), "flash-attn-3": (flash_attn_3, FlashAttention3)}


@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "one document"])
@pytest.mark.parametrize("mask", [Mask(), Mask(3), Mask(4, 2)], ids=str)
@pytest.mark.parametrize("name", PACKAGES)
def test_calls(name: str, mask: Mask, documents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """out, lse, dq, dk and dv where a rank holds two ranges, with grouped queries."""
    math, (package, kernel) = StandIn(), PACKAGES[name]
    for module, stand_in in package(math).items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    work = Work((((0, 15), (20, 45)),), mask, documents)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(40, 2, heads, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2, 4)
    )

    def results() -> list[Tensor]:
        out, lse = attend(q, k, v, work, backend="flash")
        return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]

    want = results()
    monkeypatch.setitem(KERNELS, ("flash", "cpu"), kernel())
    for got, expected in zip(results(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)
    assert (math.calls["varlen"] > 0) == (documents is not None)
    assert sum(math.calls.values()) < 2 * len(work.blocks(0, 0)) or documents is None


def test_where_a_package_is_installed_its_kernel_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"flash_attn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    had = {name: has for name, has, _ in kernels.available()}
    assert had["flash-attn-2"] and not had["flash-attn-3"]
    assert kernels.choose("flash-attn-2", "cuda", torch.bfloat16, head_dim=128) == "flash-attn-2"
