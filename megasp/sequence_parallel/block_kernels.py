"""Attention of one block with its log-sum-exp, and the backward that takes them back: the contract, and the kernels of
every device.

Every kernel returns the log-sum-exp of each row's scores beside the output, so partial results over several blocks of
keys can be merged, and its backward takes the merged out and lse from outside. Shapes of one block (`blocks.Block`):

    q [B, N, Sq, H]   k, v [B, G, Sk, H]   out [B, N, Sq, H]   lse [B, N, Sq] fp32 (fp64 for fp64)

N query heads share G kv heads in consecutive groups. A block has a mask of one of three kinds, no row without a key,
and positive lengths; a kernel that knows causal masks serves the anticausal kind with both sequences reversed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megasp.sequence_parallel.blocks import ANTICAUSAL, CAUSAL, FULL, Block
from megasp.sequence_parallel.packing import Lengths

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities whose mask is a function of (key, sample, head, query and key position).

    Args:
        probability: of dropping.
        bits: function (samples [B], first head, heads, query positions [Sq], key positions [Sk]) -> uniform 31-bit
            integers [B, N, Sq, Sk].
        samples: global sample numbers, int64 [B].
        first_head: global number of the first query head that this rank holds.
    """

    probability: float
    bits: Callable[[Tensor, int, int, Tensor, Tensor], Tensor]
    samples: Tensor
    first_head: int = 0

    def for_heads(self, offset: int) -> "AttentionDropout":
        """The same for a rank whose first head is `offset` further."""
        return replace(self, first_head=self.first_head + offset)

    def factors(self, block: Block, heads: int) -> Tensor:
        """0 or 1 / (1 - probability) for each probability of a block, [B, N, Sq, Sk]."""
        samples = self.samples if block.row is None else self.samples[block.row : block.row + 1]
        rows, columns = (
            torch.arange(position, position + stop - start, device=samples.device)
            for position, (start, stop) in ((block.q_position, block.q), (block.k_position, block.k))
        )
        bits = self.bits(samples, self.first_head, heads, rows, columns)
        return (bits >= int(self.probability * 2**31)) / (1 - self.probability)


@dataclass(frozen=True)
class Options:
    """What attention does besides softmax(scale q k^T) v under a mask."""

    scale: float
    dropout: AttentionDropout | None = None

    def for_heads(self, offset: int) -> "Options":
        return self if self.dropout is None else replace(self, dropout=self.dropout.for_heads(offset))


class Kernel(Protocol):
    """Attention of one block, on tensors of any strides."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, options: Options) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this block, from the out and lse of the queries over all their keys."""


class Unfused:
    """The mathematics written out: [B, N, Sq, Sk] scores exist. The reference, and the one with attention dropout."""

    @staticmethod
    def _scores(q: Tensor, k: Tensor, kind: str, scale: float) -> Tensor:
        """Scaled scores [B, N, Sq, Sk] in fp32 or wider, -inf where hidden."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
        if kind != FULL:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores.masked_fill_(ones.triu_(1) if kind == CAUSAL else ones.tril_(-1), -math.inf)
        return scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, options: Options) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, block.kind, options.scale)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp_()
        if options.dropout is not None:
            probabilities *= options.dropout.factors(block, q.shape[1])
        out = probabilities @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).to(probabilities.dtype)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = (self._scores(q, k, block.kind, options.scale) - lse[..., None]).exp_()
        groups = q.shape[1] // k.shape[1]
        wide_q, wide_k, wide_v, wide_out, wide_dout = (x.to(probabilities.dtype) for x in (q, k, v, out, dout))
        factors = None if options.dropout is None else options.dropout.factors(block, q.shape[1])
        dropped = probabilities if factors is None else probabilities * factors
        dprobabilities = wide_dout @ wide_v.repeat_interleave(groups, 1).transpose(-1, -2)
        if factors is not None:
            dprobabilities *= factors
        # The mean over all keys of the row, of which this block may have only some (arXiv 2205.14135).
        mean = (wide_dout * wide_out).sum(-1, keepdim=True)
        dscores = (dprobabilities - mean).mul_(probabilities).mul_(options.scale)
        dq = dscores @ wide_k.repeat_interleave(groups, 1)
        dk = sum_groups(dscores.transpose(-1, -2) @ wide_q, groups)
        dv = sum_groups(dropped.transpose(-1, -2) @ wide_dout, groups)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """[B, N, S, H] gradients by query head -> [B, N / groups, S, H] by kv head."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


class CausalKernel:
    """A kernel that knows no mask and the causal one. Anticausal blocks are reversed into causal ones."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, options: Options) -> tuple[Tensor, Tensor]:
        if block.kind != ANTICAUSAL:
            return self._forward(q, k, v, block.kind == CAUSAL, options.scale)
        out, lse = self._forward(q.flip(2), k.flip(2), v.flip(2), True, options.scale)
        return out.flip(2), lse.flip(2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        if block.kind != ANTICAUSAL:
            return self._backward(dout, q, k, v, out, lse, block.kind == CAUSAL, options.scale)
        dout, q, k, v, out, lse = (x.flip(2) for x in (dout, q, k, v, out, lse))
        dq, dk, dv = self._backward(dout, q, k, v, out, lse, True, options.scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class VarlenKernel(CausalKernel):
    """One that takes many blocks of a sample in one call, too: q, out [T, N, H], k, v [T', G, H], lse [N, T]."""

    def forward_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

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
        raise NotImplementedError


class CPUFlash(CausalKernel):
    """PyTorch's flash attention for CPUs. Serves grouped queries."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=None, scale=scale)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
        )
