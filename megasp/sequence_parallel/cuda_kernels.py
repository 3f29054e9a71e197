"""Attention of one block on CUDA: PyTorch's flash and cuDNN kernels, and the flash-attn packages.

Written from the operators' schemas; `benchmarks/gpu/attention.py` checks every one of them against the mathematics on a
device. Each has its own shape of lse; here it is [B, N, S] as in `block_kernels`.
"""

from typing import Any

import torch
from torch import Tensor

from megasp.sequence_parallel.block_kernels import CausalKernel, VarlenKernel, sum_groups
from megasp.sequence_parallel.packing import Lengths

aten = torch.ops.aten


def _no_random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """State of the dropout that flash attention is not asked for, as its forward returns it."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)


class CUDAFlash(VarlenKernel):
    """PyTorch's flash attention for CUDA. Serves grouped queries."""

    def forward_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        lengths = of_q.ends, of_k.ends, of_q.longest, of_k.longest
        return aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)[:2]

    def backward_varlen(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        of_q: Lengths,
        of_k: Lengths,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, random = (of_q.ends, of_k.ends, of_q.longest, of_k.longest), _no_random_state(q.device)
        tensors = (x.contiguous() for x in (dout, q, k, v, out, lse))
        return aten._flash_attention_backward(*tensors, *lengths, 0.0, causal, *random, scale=scale)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, random = (q.shape[2], k.shape[2]), _no_random_state(q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, *random, scale=scale
        )


class CUDNN(CausalKernel):
    """cuDNN's attention. kv heads are repeated for it, and their gradients summed."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(q.shape[:3])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        lengths = q.shape[2], k.shape[2]
        random = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()  # seed and offset of no dropout
        lse = lse.contiguous()[..., None]  # as it makes it, [B, N, S, 1]
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, *random, None, None, None, *lengths, 0.0, causal, scale=scale
        )
        return dq, sum_groups(dk, groups), sum_groups(dv, groups)


class FlashAttention2(VarlenKernel):
    """The flash-attn package (arXiv 2307.08691), version 2.7 and later. Its tensors are [B, S, heads, H]."""

    def forward_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        lengths = of_q.ends, of_k.ends, of_q.longest, of_k.longest
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *lengths, 0.0, scale, causal, *_NO_WINDOW)
        return out, lse

    def backward_varlen(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        of_q: Lengths,
        of_k: Lengths,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = _room(q, k, v)
        lengths = of_q.ends, of_k.ends, of_q.longest, of_k.longest
        options = 0.0, scale, causal, *_NO_WINDOW, 0.0, None
        _flash_attn_varlen_backward(dout, q, k, v, out, lse, dq, dk, dv, *lengths, *options, deterministic=False)
        return dq, dk, dv

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _flash_attn_forward(*tensors, 0.0, scale, causal, *_NO_WINDOW, 0.0, None, False)
        return out.transpose(1, 2), lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        gradients = _room(*tensors[1:4])
        options = 0.0, scale, causal, *_NO_WINDOW, 0.0, None
        _flash_attn_backward(*tensors, lse.contiguous(), *gradients, *options, deterministic=False)
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv


class FlashAttention3(VarlenKernel):
    """The flash-attn-3 package (arXiv 2407.08608), for Hopper GPUs. Its tensors are [B, S, heads, H]; sequences of
    varying length are a matter of its functions' keywords."""

    def forward_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self._call_forward(q, k, v, causal, scale, **_keywords(of_q, of_k))

    def backward_varlen(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        of_q: Lengths,
        of_k: Lengths,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._call_backward(dout, q, k, v, out, lse, causal, scale, **_keywords(of_q, of_k))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = self._call_forward(q, k, v, causal, scale)
        return out.transpose(1, 2), lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = self._call_backward(dout, q, k, v, out, lse.contiguous(), causal, scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    @staticmethod
    def _call_forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, **lengths: Any
    ) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal, **lengths)
        return out, lse

    @staticmethod
    def _call_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        **lengths: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_backward

        dq, dk, dv = _room(q, k, v)
        sums = {"dq": dq, "dk": dk, "dv": dv}
        _flash_attn_backward(dout, q, k, v, out, lse, **sums, **lengths, softmax_scale=scale, is_causal=causal)
        return dq, dk, dv


_NO_WINDOW = -1, -1


def _keywords(of_q: Lengths, of_k: Lengths) -> dict[str, Any]:
    """Lengths as flash-attn-3 is told of them."""
    return {
        "cu_seqlens_q": of_q.ends,
        "cu_seqlens_k": of_k.ends,
        "max_seqlen_q": of_q.longest,
        "max_seqlen_k": of_k.longest,
    }


def _room(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors for gradients of these, whatever their strides."""
    return [x.new_empty(x.shape) for x in tensors]
