"""Activations of the MLP as a Function that saves its input alone.

SwiGLU: arXiv 2002.05202; squared ReLU: arXiv 2109.08668; GELU in its tanh form, as in GPT-2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.footprint import Part
from megasp.model.elementwise import Body, Run, eager


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    dx = torch.empty_like(gate_up)
    dgate, dup = dx.chunk(2, -1)
    torch.mul(dy, F.silu(gate), out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return dx


def _swiglu_backward_whole(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)), -1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square_()


def _squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return dy * F.relu(x).mul_(2)


@dataclass(frozen=True)
class _Kind:
    """Forward: x -> y. Backward: dy, x -> dx."""

    forward: Body
    backward: Body


_SWIGLU = _Kind(Body("SwiGLU", _swiglu), Body("SwiGLU's backward", _swiglu_backward, _swiglu_backward_whole))
"""[..., gate; up] -> silu(gate) * up, [..., 2 F] -> [..., F]."""
_GELU = _Kind(Body("GELU", _gelu), Body("GELU's backward", _gelu_backward))
_SQUARED_RELU = _Kind(Body("squared ReLU", _squared_relu), Body("squared ReLU's backward", _squared_relu_backward))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: _Kind, run: Run) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.run = kind, run
        return run(kind.forward, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.run(ctx.kind.backward, dy, *ctx.saved_tensors), None, None


def _activated(x: Tensor, kind: _Kind, run: Run) -> Tensor:
    return _Activation.apply(x, kind, run)


def activation(config: ModelConfig, run: Run = eager) -> Callable[[Tensor], Tensor]:
    """The MLP's activation: [..., F] -> [..., F], or [..., 2 F] -> [..., F] where it is gated."""
    kind = _SWIGLU if config.swiglu else _SQUARED_RELU if config.squared_relu else _GELU
    return partial(_activated, kind=kind, run=run)


def activation_footprint(config: ModelConfig, hidden: int, compiled: bool = False) -> Part:
    """Bytes of the activation whose output has `hidden` bytes."""
    gradient = 2 * hidden if config.swiglu else hidden
    working = gradient * (2 if (config.swiglu or config.squared_relu) and not compiled else 1)
    return Part("MLP, activated", hidden, hidden, working)
