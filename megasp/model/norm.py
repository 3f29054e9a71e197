"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) over the last dim, as Functions that save their input,
its statistics (fp32, one or two numbers a row) and the weight. Kernels compute (`norm_kernels.py`)."""

from typing import Any

import torch
from torch import Tensor, nn

from megasp.footprint import Part
from megasp.model.init import Factory
from megasp.model.layers import ONE_RANK, replicated
from megasp.model.norm_kernels import UNFUSED, NormKernel
from megasp.model.tiles import tiled
from megasp.model.weight_gradients import gradient_dtype
from megasp.parallel_state import Axis


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kernel: NormKernel) -> Tensor:
        y, rstd = kernel.rms(x, weight, epsilon)
        ctx.save_for_backward(x, weight, rstd)
        ctx.epsilon, ctx.kernel, ctx.dtype = epsilon, kernel, gradient_dtype(weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.kernel.rms_backward(dy, *ctx.saved_tensors, ctx.epsilon)
        return dx, dweight.to(ctx.dtype), None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, kernel: NormKernel) -> Tensor:
        y, mean, rstd = kernel.layer(x, weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.epsilon, ctx.kernel, ctx.dtype = epsilon, kernel, gradient_dtype(weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dx, dweight, dbias = ctx.kernel.layer_backward(dy, *ctx.saved_tensors, ctx.epsilon)
        return dx, dweight.to(ctx.dtype), dbias.to(ctx.dtype), None, None


class Norm(nn.Module):
    """The norm of a model, its weights held whole by every tensor-parallel rank.

    Args:
        kind: "RMSNorm" or "LayerNorm" (with bias).
        size: length of the last dim.
        partial: this rank's gradient of the weights is only a share (its part of the sequence, or of the heads).
        tiles: of dim 0, normalized one after another.
        kernel: what computes it.

    Forward: [..., size] -> [..., size].
    """

    def __init__(
        self,
        kind: str,
        size: int,
        epsilon: float = 1e-5,
        axis: Axis = ONE_RANK,
        *,
        partial: bool = False,
        factory: Factory | None = None,
        name: str = "norm",
        tiles: int = 1,
        kernel: NormKernel = UNFUSED,
    ) -> None:
        super().__init__()
        factory = factory or Factory()
        self.epsilon, self.tiles, self.kernel = epsilon, tiles, kernel
        self.weight = factory.parameter([replicated(f"{name}.weight", (size,), axis, partial=partial, init_mean=1.0)])
        self.bias = None
        if kind == "LayerNorm":
            self.bias = factory.parameter([replicated(f"{name}.bias", (size,), axis, partial=partial)])

    def forward(self, x: Tensor) -> Tensor:
        if self.tiles == 1:
            return self._normalized(x)
        return tiled(lambda x, _: self._normalized(x), x, self.tiles, list(self.parameters()))

    def _normalized(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return _RMSNorm.apply(x, self.weight, self.epsilon, self.kernel)
        return _LayerNorm.apply(x, self.weight, self.bias, self.epsilon, self.kernel)


def norm_footprint(kind: str, rows: int, size: int, item: int, name: str, fused: bool = False) -> Part:
    """Bytes of the norm of `rows` rows of `size` elements of `item` bytes, by one kernel or by PyTorch's operations."""
    wide = max(item, 4)
    x, wide_x, narrow = rows * size * item, rows * size * wide, item < wide
    if fused:
        kept = {"statistics": (1 if kind == "RMSNorm" else 2) * rows * wide}
        return Part(name, x, x, x, kept)
    if kind == "RMSNorm":
        kept, forward = {"statistics": rows * wide}, x + 2 * wide_x * narrow
        backward = (4 if narrow else 3) * wide_x
    else:
        kept, forward = {"statistics": 2 * rows * wide}, x + 2 * wide_x * narrow
        backward = x + 3 * wide_x * narrow
    return Part(name, x, forward, backward, kept)
