"""Dropout whose mask is a pure function of what it masks, so that every layout drops the same values.

The mask of an element depends on (seed, sample, layer and site, global position, feature) and on nothing else: not on
the rank, the microbatch, or what was drawn before. `sample` is the global sample number, which no two steps share. No
random state exists, recomputation draws the same mask, and a checkpoint has nothing to store.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasp.footprint import Part
from megasp.model.elementwise import Body, Run, eager


@dataclass(frozen=True)
class TokenKeys:
    """What names the tokens of a microbatch: global sample numbers int64 [B] and global positions int64 [S]."""

    samples: Tensor
    positions: Tensor


def site_key(seed: int, site: str) -> int:
    """A 62-bit key of one place in the model ("layers.3.attention")."""
    digest = hashlib.blake2b(repr((seed, site)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors, in place (products wrap; shifts are made logical by masking)."""
    z ^= (z >> 30) & 0x3FFFFFFFF
    z *= -0x40A7B892E31B1A47
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= -0x6B2FB644ECCEEE15
    return z.bitwise_xor_((z >> 31) & 0x1FFFFFFFF)


def uniform_bits(key: int, keys: TokenKeys, features: int) -> Tensor:
    """Uniform 31-bit integers, int64 [S, B, features]."""
    token, feature = _names(key, keys, features)
    return _bits(token, feature)


def _names(key: int, keys: TokenKeys, features: int) -> tuple[Tensor, Tensor]:
    """What the bits of an element are mixed from: int64 [S, B, 1] and [1, 1, features]."""
    sample = _mix(keys.samples + key)
    token = _mix(keys.positions[:, None] + sample[None, :])
    feature = _mix(torch.arange(features, device=keys.positions.device) + (key ^ 0x5DEECE66D))
    return token[:, :, None], feature[None, None]


def _bits(token: Tensor, feature: Tensor) -> Tensor:
    return _mix(token ^ feature) & 0x7FFFFFFF


def _drop(x: Tensor, token: Tensor, feature: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """y, and which elements are kept."""
    kept = _bits(token, feature) >= int(probability * 2**31)
    return (x * kept).mul_(1 / (1 - probability)), kept


def _drop_backward(dy: Tensor, kept: Tensor, probability: float) -> Tensor:
    return (dy * kept).mul_(1 / (1 - probability))


_DROP, _DROP_BACKWARD = Body("dropout", _drop), Body("dropout's backward", _drop_backward)


class _Dropout(torch.autograd.Function):
    """Saves the mask, one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, key: int, keys: TokenKeys, run: Run) -> Tensor:
        y, kept = run(_DROP, x, *_names(key, keys, x.shape[-1]), probability=probability)
        ctx.save_for_backward(kept)
        ctx.probability, ctx.run = probability, run
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.run(_DROP_BACKWARD, dy, *ctx.saved_tensors, probability=ctx.probability), None, None, None, None


def dropout(x: Tensor, probability: float, key: int, keys: TokenKeys | None, run: Run = eager) -> Tensor:
    """Drop elements of `x` [S, B, D] with `probability` and scale the rest by 1 / (1 - probability).

    Args:
        key: `site_key` of this place.
        keys: the names of these tokens; None (evaluation, generation) drops nothing.
    """
    if probability == 0 or keys is None:
        return x
    return _Dropout.apply(x, probability, key, keys, run)


def attention_bits(key: int, samples: Tensor, first_head: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Uniform 31-bit integers for attention probabilities, int64 [B, heads, Sq, Sk].

    Args:
        key: `site_key` of the layer.
        samples: global sample numbers, int64 [B].
        first_head: global number of the first head.
        queries, keys: global positions, int64 [Sq] and [Sk].
    """
    device = samples.device
    sample = _mix(samples + key)[:, None]
    head = _mix(torch.arange(first_head, first_head + heads, device=device) + sample)[:, :, None]
    row = _mix(queries + head)[:, :, :, None]
    column = _mix(keys + (key ^ 0x5DEECE66D))
    return _mix(row ^ column) & 0x7FFFFFFF


def dropout_footprint(elements: int, item: int, compiled: bool = False) -> Part:
    """Bytes of dropping from `elements` elements: the bits are 64 wide while they are mixed."""
    return Part(
        "residual branch",
        elements * item,
        (item + 1 if compiled else 24) * elements,
        elements * item,
        {"dropout masks": elements},
        keeps_input=False,
    )
