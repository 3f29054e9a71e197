"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) over the last dim, as Functions that save their input,
its statistics (fp32, one or two numbers a row) and the weight. Statistics and sums are computed in fp32 or wider."""

from typing import Any

import torch
from torch import Tensor, nn

from megasp.footprint import Part
from megasp.model.init import Factory
from megasp.model.layers import ONE_RANK, replicated
from megasp.model.tiles import tiled
from megasp.model.weight_gradients import gradient_dtype
from megasp.parallel_state import Axis


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.dtype = gradient_dtype(weight)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        dy = dy.to(normed.dtype)
        dweight = (dy * normed).flatten(0, -2).sum(0)
        dnormed = dy * weight
        projection = torch.linalg.vecdot(dnormed, normed).unsqueeze(-1).div_(x.shape[-1])
        return dnormed.addcmul_(normed, projection, value=-1).mul_(rstd).to(x.dtype), dweight.to(ctx.dtype), None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y, mean, rstd = torch.native_layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.dtype = gradient_dtype(weight)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide_dy, wide_x, wide_weight, wide_bias = (t.to(rstd.dtype) for t in (dy, x, weight, bias))
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            wide_dy.contiguous(), wide_x, weight.shape, mean, rstd, wide_weight, wide_bias, [True, True, True]
        )
        return dx.to(x.dtype), dweight.to(ctx.dtype), dbias.to(ctx.dtype), None


class Norm(nn.Module):
    """The norm of a model, its weights held whole by every tensor-parallel rank.

    Args:
        kind: "RMSNorm" or "LayerNorm" (with bias).
        size: length of the last dim.
        partial: this rank's gradient of the weights is only a share (its part of the sequence, or of the heads).
        tiles: of dim 0, normalized one after another.

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
    ) -> None:
        super().__init__()
        factory = factory or Factory()
        self.epsilon, self.tiles = epsilon, tiles
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
            return _RMSNorm.apply(x, self.weight, self.epsilon)
        return _LayerNorm.apply(x, self.weight, self.bias, self.epsilon)


def norm_footprint(kind: str, rows: int, size: int, item: int, name: str) -> Part:
    """Bytes of the norm of `rows` rows of `size` elements of `item` bytes."""
    wide = max(item, 4)
    x, wide_x, narrow = rows * size * item, rows * size * wide, item < wide
    if kind == "RMSNorm":
        kept, forward = {"statistics": rows * wide}, x + 2 * wide_x * narrow
        backward = (4 if narrow else 3) * wide_x
    else:
        kept, forward = {"statistics": 2 * rows * wide}, x + 2 * wide_x * narrow
        backward = x + 3 * wide_x * narrow
    return Part(name, x, forward, backward, kept)
