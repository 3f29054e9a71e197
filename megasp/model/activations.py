"""Activations of the MLP as Functions that save their input alone.

SwiGLU: arXiv 2002.05202; squared ReLU: arXiv 2109.08668; GELU in its tanh form, as in GPT-2.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.footprint import Part


class _SwiGLU(torch.autograd.Function):
    """[..., gate; up] -> silu(gate) * up, [..., 2 F] -> [..., F]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        dx = torch.empty_like(gate_up)
        dgate, dup = dx.chunk(2, -1)
        torch.mul(dy, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return dx


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * F.relu(x).mul_(2)


def activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The MLP's activation: [..., F] -> [..., F], or [..., 2 F] -> [..., F] where it is gated."""
    if config.swiglu:
        return _SwiGLU.apply
    return _SquaredReLU.apply if config.squared_relu else _GELU.apply


def activation_footprint(config: ModelConfig, hidden: int) -> Part:
    """Bytes of the activation whose output has `hidden` bytes."""
    working = 4 if config.swiglu else 2 if config.squared_relu else 1
    return Part("MLP, activated", hidden, hidden, working * hidden)
