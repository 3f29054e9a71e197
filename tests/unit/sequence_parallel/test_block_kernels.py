"""Kernels of this machine against the definition, block by block, with the merged lse in the backward."""

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megasp.config.kernels import ATTENTION_KERNELS, choose_kernel
from megasp.errors import ConfigError
from megasp.sequence_parallel import Mask, Work, attend
from megasp.sequence_parallel.block_kernels import CPUFlash, Options, VarlenKernel
from megasp.sequence_parallel.blocks import ANTICAUSAL, CAUSAL, FULL, Block
from megasp.sequence_parallel.kernels import KERNELS, choose
from megasp.sequence_parallel.packing import Lengths, Pack
from megasp.sequence_parallel.parcels import Parcel, Partial
from tests.reference_attention import attention, visible

ON_CPU = [name for name, device in KERNELS if device == "cpu"]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", [FULL, CAUSAL, ANTICAUSAL])
@pytest.mark.parametrize("name", ON_CPU)
def test_kernel_of_one_block(name: str, kind: str) -> None:
    queries, keys = 6, 6 if kind != FULL else 9
    shapes = (4, queries), (2, keys), (2, keys), (4, queries)
    q, k, v, dout = (random(2, heads, length, 8) for heads, length in shapes)
    ones = torch.ones(queries, keys, dtype=torch.bool)
    seen = {FULL: ones, CAUSAL: ones.tril(), ANTICAUSAL: ones.triu()}[kind]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = (leaves[0] @ leaves[1].repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    scores = scores.masked_fill(~seen, -torch.inf)
    want = scores.softmax(-1) @ leaves[2].repeat_interleave(2, 1)
    want.backward(dout)
    block, options = Block(None, (0, queries), (0, keys), kind, 0, 0), Options(0.3)
    kernel = KERNELS[name, "cpu"]
    out, lse = kernel.forward(q, k, v, block, options)
    gradients = kernel.backward(dout, q, k, v, out, lse.contiguous(), block, options)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-13, rtol=0)
    for got, expected in zip((out, *gradients), (want, *(x.grad for x in leaves)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 4e-6), (torch.bfloat16, 2e-2)]
)
def test_merged_blocks_are_the_whole(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """A window cut into many blocks agrees with the definition to the precision of one rounding of the output."""
    length, mask, starts = 40, Mask(5, 1), [0, 1, 2, 17]
    q, k, v, dout = (random(length, 2, heads, 16, dtype=dtype).requires_grad_() for heads in (4, 2, 2, 4))
    work = Work((((0, length),),), mask, [torch.tensor(starts).numpy(), torch.tensor([0]).numpy()])
    out, _ = attend(q, k, v, work, backend=name)
    got = torch.autograd.grad(out, (q, k, v), dout)
    seen = torch.stack([visible(length, mask, starts), visible(length, mask)])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attention(*wide, seen)
    expected = torch.autograd.grad(want, wide, dout.double())
    for a, b in zip((out, *got), (want, *expected), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


class Looping(VarlenKernel):
    """What a varlen kernel does, sequence by sequence."""

    calls = 0

    def _each(self, of_q: Lengths, of_k: Lengths) -> Iterator[tuple[slice, slice]]:
        self.calls += 1
        bounds = zip(pairwise(of_q.ends.tolist()), pairwise(of_k.ends.tolist()), strict=True)
        return ((slice(*queries), slice(*keys)) for queries, keys in bounds)

    def forward_varlen(self, q, k, v, of_q, of_k, causal, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for i, j in self._each(of_q, of_k):
            one = (x.transpose(0, 1)[None] for x in (q[i], k[j], v[j]))
            part, part_lse = CPUFlash()._forward(*one, causal, scale)
            out[i], lse[:, i] = part[0].transpose(0, 1), part_lse[0]
        return out, lse

    def backward_varlen(self, dout, q, k, v, out, lse, of_q, of_k, causal, scale):
        gradients = [torch.zeros_like(x) for x in (q, k, v)]
        for i, j in self._each(of_q, of_k):
            one = (x.transpose(0, 1)[None] for x in (dout[i], q[i], k[j], v[j], out[i]))
            parts = CPUFlash()._backward(*one, lse[None, :, i].contiguous(), causal, scale)
            for whole, part, at in zip(gradients, parts, (i, j, j), strict=True):
                whole[at] += part[0].transpose(0, 1)
        return tuple(gradients)

    _forward, _backward = CPUFlash._forward, CPUFlash._backward


@pytest.mark.parametrize("mask", [Mask(), Mask(3), Mask(4, 2), Mask(0)])
def test_packed_blocks_are_the_same(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    length, starts = 40, [np.array([0, 1, 2, 17, 30, 31]), np.array([0, 9])]
    work = Work((((0, 15), (20, 45)),), mask, starts)
    q, k, v, dout = (random(length, 2, heads, 8).requires_grad_() for heads in (4, 2, 2, 4))

    def results() -> list[Tensor]:
        out, lse = attend(q, k, v, work, backend="flash")
        return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]

    want, looping = results(), Looping()
    monkeypatch.setitem(KERNELS, ("flash", "cpu"), looping)
    for got, expected in zip(results(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)
    assert 0 < looping.calls < len(work.blocks(0, 0))


def test_packs_are_freed_without_the_collector() -> None:
    """They hold tensors of a device, which must go with the microbatch."""
    work = Work((((0, 40),),), documents=[np.array([0, 9, 20, 31])])
    [pack] = [call for call in work.calls(0, 0, varlen=True) if isinstance(call, Pack)]
    columns, _ = pack.q(torch.device("cpu"))
    assert pack.q(torch.device("cpu"))[0] is columns, "made once"
    gone = weakref.ref(pack)
    gc.disable()
    try:
        del work, pack
        assert gone() is None
    finally:
        gc.enable()


def test_rows_without_a_key() -> None:
    q = random(1, 2, 3, 4)
    partial = Partial(q)
    partial.merge(torch.zeros_like(q), torch.full((1, 2, 3), -torch.inf, dtype=torch.float64))
    assert (partial.out == 0).all() and (partial.lse == -torch.inf).all()
    partial.merge(q[:, :, 1:2], torch.zeros(1, 2, 1, dtype=torch.float64), (slice(None), slice(None), slice(1, 2)))
    assert torch.equal(partial.out[:, :, 1], q[:, :, 1]) and (partial.lse[:, :, [0, 2]] == -torch.inf).all()
    partial.merge(q * torch.nan, torch.zeros(1, 2, 3, dtype=torch.float64))
    assert partial.out.isnan().all(), "a kernel's NaN is not hidden"


def test_parcels_are_one_buffer() -> None:
    parcel = Parcel.of((torch.ones(3), torch.arange(5).to(torch.bfloat16)[::2]))
    assert parcel.buffer.numel() == 3 * 4 + 3 * 2 and parcel.tensors[1].tolist() == [0, 2, 4]
    again = Parcel.zeros(parcel.tensors)
    again.buffer.copy_(parcel.buffer)
    again.add_(parcel)
    assert again.tensors[0].tolist() == [2, 2, 2]


def test_registry() -> None:
    assert {name for name, _ in KERNELS} == set(ATTENTION_KERNELS)
    assert choose("auto", "cpu", torch.bfloat16) == "flash"
    assert choose("auto", "cpu", torch.float32, dropout=0.1) == "unfused"
    name, reasons = choose_kernel("flash", "cpu", "float32", 0.1, 64)
    assert name is None and "attention dropout" in reasons
    with pytest.raises(ConfigError, match="attention-backend fused"):
        choose("fused", "cpu", torch.float32)
    with pytest.raises(ConfigError, match="is not installed here"):
        choose("flash-attn-3", "cuda", torch.bfloat16)
