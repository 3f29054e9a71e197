"""Attention kernels behind one registry: q, k, v -> (out, lse), and the backward that takes them back.

Every kernel returns the log-sum-exp of each row's scores beside the output, so partial results over several blocks of
keys can be merged (ring attention), and its backward takes out and lse from outside. Shapes, with S sequence-first:

    q [S, B, N, H]   k, v [S, B, G, H]   out [S, B, N, H]   lse [B, N, S] fp32 (fp64 for fp64)

N query heads share G kv heads in consecutive groups. Softmax scale is 1 / sqrt(H) unless given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megasp.config.kernels import ATTENTION_KERNELS, choose_kernel
from megasp.errors import ConfigError

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities whose mask is a function of (key, sample, head, query and key position).

    Args:
        probability: of dropping.
        bits: function (key, samples [B], first head, heads, queries, keys) -> uniform 31-bit integers [B, N, S, S].
        samples: global sample numbers, int64 [B].
        first_head: global number of the first query head that this rank holds.
    """

    probability: float
    bits: Callable[[Tensor, int, int, int, int], Tensor]
    samples: Tensor
    first_head: int = 0

    def for_heads(self, offset: int) -> "AttentionDropout":
        """The same for a rank whose first head is `offset` further."""
        return replace(self, first_head=self.first_head + offset)

    def factors(self, heads: int, queries: int, keys: int) -> Tensor:
        """0 or 1 / (1 - probability) for each probability, [B, N, queries, keys]."""
        bits = self.bits(self.samples, self.first_head, heads, queries, keys)
        return (bits >= int(self.probability * 2**31)) / (1 - self.probability)


@dataclass(frozen=True)
class Options:
    """What attention does besides softmax(scale q k^T) v."""

    causal: bool
    scale: float
    dropout: AttentionDropout | None = None


class Kernel(Protocol):
    """Block attention on [B, heads, S, H] tensors of any strides."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        """(out, lse, anything else its backward wants)."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv from what `forward` returned."""


class Unfused:
    """The mathematics written out: [B, N, S, S] scores exist. The reference, and the one with attention dropout."""

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Softmax probabilities [B, N, Sq, Sk] and lse [B, N, Sq] in fp32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * options.scale
        if options.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden, -math.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp_(), lse

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        probabilities, lse = self._probabilities(q, k, options)
        if options.dropout is not None:
            probabilities *= options.dropout.factors(*probabilities.shape[1:])
        out = probabilities @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).to(probabilities.dtype)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, _ = self._probabilities(q, k, options)
        groups = q.shape[1] // k.shape[1]
        wide_q, wide_k, wide_v, wide_dout = (x.to(probabilities.dtype) for x in (q, k, v, dout))
        factors = options.dropout.factors(*probabilities.shape[1:]) if options.dropout is not None else None
        dropped = probabilities if factors is None else probabilities * factors
        dprobabilities = wide_dout @ wide_v.repeat_interleave(groups, 1).transpose(-1, -2)
        if factors is not None:
            dprobabilities *= factors
        mean = (dprobabilities * probabilities).sum(-1, keepdim=True)
        dscores = (dprobabilities - mean).mul_(probabilities).mul_(options.scale)
        dq = dscores @ wide_k.repeat_interleave(groups, 1)
        dk = _sum_groups(dscores.transpose(-1, -2) @ wide_q, groups)
        dv = _sum_groups(dropped.transpose(-1, -2) @ wide_dout, groups)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """[B, N, S, H] gradients by query head -> [B, N / groups, S, H] by kv head."""
    return x.unflatten(1, (-1, groups)).sum(2)


class CPUFlash:
    """PyTorch's flash attention for CPUs. Serves grouped queries; both lengths must be positive."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, options.causal, attn_mask=None, scale=options.scale
        )

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, *saved, 0.0, options.causal, attn_mask=None, scale=options.scale
        )


class CUDAFlash:
    """PyTorch's flash attention for CUDA. Serves grouped queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, options.causal, False, scale=options.scale
        )
        return out, lse, seed, offset

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, seed, offset = saved
        lengths = q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, *lengths, 0.0, options.causal, seed, offset, scale=options.scale
        )


class CUDNN:
    """cuDNN's attention. kv heads are repeated for it, and their gradients summed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
        )
        return out, lse, seed, offset

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, seed, offset = saved
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        lengths = q.shape[2], k.shape[2]
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, None, None, *lengths, 0.0, options.causal, scale=options.scale
        )
        return dq, _sum_groups(dk, groups), _sum_groups(dv, groups)


KERNELS: dict[tuple[str, str], Kernel] = {
    ("unfused", "cpu"): Unfused(),
    ("unfused", "cuda"): Unfused(),
    ("flash", "cpu"): CPUFlash(),
    ("flash", "cuda"): CUDAFlash(),
    ("fused", "cuda"): CUDNN(),
}
"""(name, device type) -> kernel; what each can serve stands in `megasp.config.kernels`."""


def available() -> list[tuple[str, bool, str]]:
    """(name, whether this machine has it, what it is) of every kernel."""
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    return [
        (name, bool(devices & facts.devices.keys()), facts.description) for name, facts in ATTENTION_KERNELS.items()
    ]


def choose(backend: str, device_type: str, dtype: torch.dtype, dropout: float = 0.0, head_dim: int = 64) -> str:
    """The name of the kernel that `backend` (a name or "auto") means here.

    Raises:
        ConfigError: it cannot serve this.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    name, reasons = choose_kernel(backend, device_type, dtype_name, dropout, head_dim)
    if name is None:
        raise ConfigError(f"--attention-backend {backend}", reasons, "use --attention-backend auto")
    return name


class _Attend(torch.autograd.Function):
    """Saves q, k, v, out, lse (and what the kernel adds: two random-state scalars on CUDA)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, options: Options) -> tuple[Tensor, Tensor]:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        saved = kernel.forward(q, k, v, options)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.kernel, ctx.options = kernel, options
        out, lse = saved[:2]
        ctx.mark_non_differentiable(lse)
        return out.permute(2, 0, 1, 3), lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        gradients = ctx.kernel.backward(dout.permute(1, 2, 0, 3), q, k, v, tuple(saved), ctx.options)
        return *(x.permute(2, 0, 1, 3) for x in gradients), None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    dropout: AttentionDropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the whole sequence on this rank.

    Args:
        q: [S, B, N, H].
        k, v: [S, B, G, H]; G divides N.
        backend: a kernel's name, or "auto".
        causal: whether position i sees only keys at or before i.
        scale: of the scores; 1 / sqrt(H) without it.
        dropout: of the probabilities; only "unfused" serves it.
    Returns:
        out [S, B, N, H] and lse [B, N, S] (not differentiable).
    """
    probability = dropout.probability if dropout is not None else 0.0
    name = choose(backend, q.device.type, q.dtype, probability, q.shape[-1])
    options = Options(causal, scale or q.shape[-1] ** -0.5, dropout)
    return _Attend.apply(q, k, v, KERNELS[name, q.device.type], options)
