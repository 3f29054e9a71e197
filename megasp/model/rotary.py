"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split convention of GPT-NeoX and Llama, and its
scalings to longer contexts than a model was trained with."""

import math
from typing import Any

import torch
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.footprint import Part
from megasp.model.elementwise import Body, Run, eager

LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0
YARN_BETA_SLOW = 1.0
YARN_BETA_FAST = 32.0


def frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotating pair of channels, fp64 [rotary channels / 2].

    --rotary-scaling by a factor f, where a context of L positions was trained with:

        linear   all frequencies divided by f: positions interpolated (arXiv 2306.15595)
        ntk      the base times f^(C / (C - 2)) of C channels: the highest frequency is kept, the lowest divided by f
        yarn     a ramp over the channels from those that turn 32 times in L, kept, to those that turn once, divided
                 (arXiv 2309.00071; `attention_factor` belongs to it)
        llama3   a ramp over the frequencies from those that turn 4 times in L, kept, to those that turn once (arXiv
                 2407.21783; the numbers are those of its released configuration)
    """
    channels = int(config.head_dim * config.rotary_percent) // 2 * 2
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    inverse = config.rotary_base**-exponents
    if config.rotary_scaling is None:
        return inverse
    factor, context = config.rotary_factor, config.rotary_original_context
    if config.rotary_scaling == "linear":
        return inverse / factor
    if config.rotary_scaling == "ntk":
        return config.ntk_base**-exponents
    if config.rotary_scaling == "yarn":
        kept = _yarn_kept(channels, config.rotary_base, context)
    else:
        low, high = LLAMA3_LOW_FREQUENCY_FACTOR, LLAMA3_HIGH_FREQUENCY_FACTOR
        turns = context * inverse / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / factor)


def _yarn_kept(channels: int, base: float, context: int) -> Tensor:
    """Share of each frequency that YaRN leaves as it is, fp64 [channels / 2]."""

    def channel(turns: float) -> float:
        """The (fractional) number of the pair that turns so often within the context."""
        return channels * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(channel(YARN_BETA_FAST)), 0)
    last = min(math.ceil(channel(YARN_BETA_SLOW)), channels - 1)
    ramp = (torch.arange(channels // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin, and so queries and keys, are multiplied by: YaRN's temperature (equation 22); else 1."""
    return 0.1 * math.log(config.rotary_factor) + 1 if config.rotary_scaling == "yarn" else 1.0


def cos_sin(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables in `dtype` for int64 positions [S], or [S, B] where rows differ: cos, sin [S, 1 or B, 1, channels / 2].

    Angles are computed in fp64: at a million tokens fp32 is off by several degrees.
    """
    positions = positions if positions.dim() == 2 else positions[:, None]
    angles = positions.double()[:, :, None, None] * frequencies(config).to(positions.device)
    factor = attention_factor(config)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the leading channels of the first `heads` heads of `x` [S, B, N, H] in place."""
    half, turning = cos.shape[-1], x[:, :, :heads]
    first, second = turning[..., :half], turning[..., half : 2 * half]
    rotated = first * cos - second * sin
    torch.mul(second, cos, out=second).addcmul_(first, sin)
    first.copy_(rotated)
    return x


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return _rotate_(dy.clone(memory_format=torch.contiguous_format), cos, -sin, heads)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The same, written elsewhere: each value is read and written once."""
    half = cos.shape[-1]
    turning = (torch.arange(x.shape[2], device=x.device) < heads)[:, None]
    first, second, still = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = first * cos - second * sin, second * cos + first * sin
    # To join heads, too, would take a second tensor: a compiler joins along one dim without.
    return torch.cat((torch.where(turning, turned[0], first), torch.where(turning, turned[1], second), still), -1)


def _rotated_back(dy: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return _rotated(dy, cos, -sin, heads)


_ROTATE = Body("rotary", _rotate_, _rotated)
_ROTATE_BACK = Body("rotary's backward", _rotate_back, _rotated_back)


class _Rotate(torch.autograd.Function):
    """Rotates the first `heads` heads of the fused [S, B, heads * H]; saves the tables alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor, run: Run) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.head_dim, ctx.run = heads, head_dim, run
        given = x.view(*x.shape[:2], -1, head_dim)
        y = run(_ROTATE, given, cos, sin, heads=heads)
        if y is not given:
            return y.view(x.shape)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        by_head = dy.reshape(*dy.shape[:2], -1, ctx.head_dim)
        dx = ctx.run(_ROTATE_BACK, by_head, *ctx.saved_tensors, heads=ctx.heads)
        return dx.view(dy.shape), None, None, None, None, None


def rotate_(x: Tensor, heads: int, head_dim: int, table: tuple[Tensor, Tensor], run: Run = eager) -> Tensor:
    """Rotate the first `heads` heads of `x` [S, B, heads' * H] and return it: in place, so that no copy is kept, or by
    one kernel into a tensor that takes its place.

    Args:
        table: `cos_sin` of the positions that this rank holds.
    """
    return _Rotate.apply(x, heads, head_dim, *table, run)


def rotary_footprint(qkv: int, rotating: int, compiled: bool = False) -> Part:
    """Bytes of rotating `rotating` bytes of heads within a fused tensor of `qkv` bytes; the tables are of the model."""
    if compiled:
        return Part("q, k, v", qkv, qkv, qkv, keeps_input=False)
    working = 3 * rotating // 2
    return Part("q, k, v", None, working, qkv + working, keeps_input=False)


def tables_footprint(config: ModelConfig, positions: int, item: int) -> int:
    """Bytes of the tables of cos and sin."""
    return positions * len(frequencies(config)) * 2 * item if config.position_embedding_type == "rope" else 0
