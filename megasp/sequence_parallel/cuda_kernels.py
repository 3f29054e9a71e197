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


class FlashAttention2(CausalKernel):
    """The flash-attn package (arXiv 2307.08691), version 2.7 and later. Its tensors are [B, S, heads, H]."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, scale, causal, -1, -1, 0.0, None, False
        )
        return out.transpose(1, 2), lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        gradients = _like(q, k, v)
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        _flash_attn_backward(
            *tensors, lse.contiguous(), *gradients, 0.0, scale, causal, -1, -1, 0.0, None, deterministic=False
        )
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv


class FlashAttention3(CausalKernel):
    """The flash-attn-3 package (arXiv 2407.08608), for Hopper GPUs. Its tensors are [B, S, heads, H]."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=causal)
        return out.transpose(1, 2), lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_backward

        gradients = _like(q, k, v)
        sums: dict[str, Any] = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        _flash_attn_backward(*tensors, lse.contiguous(), **sums, softmax_scale=scale, is_causal=causal)
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv


def _like(*tensors: Tensor) -> list[Tensor]:
    """Room for the gradients of [B, heads, S, H] tensors as [B, S, heads, H]."""
    return [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in tensors]
