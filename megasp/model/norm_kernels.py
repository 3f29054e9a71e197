"""Kernels of RMSNorm and LayerNorm: what each computes forward and backward, without autograd. What is kept between is
listed by `norm.py`, and the same for all.

Those of packages have never been run where they are from; tests put small modules in their place that check order,
shapes and dtypes of what is passed, and compute.
"""

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from megasp.model.compiled import compiled
from megasp.model.elementwise import Body


class NormKernel(Protocol):
    """Statistics are fp32 or wider, one of each kind a row, in a shape of the kernel's own."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """y, 1 / root mean square: x [..., D], weight [D] -> [..., D], one a row."""

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """dx in the dtype of x, dweight in the weight's or wider."""

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean, 1 / standard deviation."""

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias."""


class Unfused:
    """The mathematics in PyTorch's operations; sums in fp32 or wider."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(epsilon).rsqrt_()
        return (wide * rstd).mul_(weight).to(x.dtype), rstd

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        normed = x * rstd
        dy = dy.to(normed.dtype)
        dweight = (dy * normed).flatten(0, -2).sum(0)
        dnormed = dy * weight
        projection = torch.linalg.vecdot(dnormed, normed).unsqueeze(-1).div_(x.shape[-1])
        return dnormed.addcmul_(normed, projection, value=-1).mul_(rstd).to(x.dtype), dweight

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y, mean, rstd = torch.native_layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon)
        return y.to(x.dtype), mean, rstd

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide_dy, wide_x, wide_weight, wide_bias = (t.to(rstd.dtype) for t in (dy, x, weight, bias))
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            wide_dy.contiguous(), wide_x, weight.shape, mean, rstd, wide_weight, wide_bias, [True, True, True]
        )
        return dx.to(x.dtype), dweight, dbias


class Compiled:
    """The same mathematics in one kernel that torch.compile makes; weights' gradients are not rounded."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return compiled(_RMS, x, weight, epsilon=epsilon)

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        return compiled(_RMS_BACKWARD, dy, x, weight, rstd, epsilon=epsilon)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return compiled(_LAYER, x, weight, bias, epsilon=epsilon)

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return compiled(_LAYER_BACKWARD, dy, x, weight, bias, mean, rstd, epsilon=epsilon)


class Fused:
    """PyTorch's CUDA kernels: one pass over memory, sums in fp32."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._fused_rms_norm(x, weight.shape, weight, epsilon)

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._fused_rms_norm_backward(dy.contiguous(), x, weight.shape, rstd, weight, [True, True])

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, weight.shape, weight, bias, epsilon)

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), x, weight.shape, mean, rstd, weight, bias, [True, True, True]
        )


class Apex:
    """The functions of apex's extension that its FusedRMSNorm and FusedLayerNorm call (not "memory efficient")."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        import fused_layer_norm_cuda as apex

        return apex.rms_forward_affine(x.contiguous(), weight.shape, weight, epsilon)

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        import fused_layer_norm_cuda as apex

        return apex.rms_backward_affine(dy.contiguous(), rstd, x.contiguous(), weight.shape, weight, epsilon, False)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        import fused_layer_norm_cuda as apex

        return apex.forward_affine(x.contiguous(), weight.shape, weight, bias, epsilon)

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        import fused_layer_norm_cuda as apex

        return apex.backward_affine(
            dy.contiguous(), mean, rstd, x.contiguous(), weight.shape, weight, bias, epsilon, False
        )


class TransformerEngine:
    """The functions of Transformer Engine's extension that its RMSNorm and LayerNorm call (2.0 or later)."""

    def rms(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        te = _transformer_engine()
        y, _, rstd = te.rmsnorm_fwd(_rows(x), weight, epsilon, None, None, _te_dtype(x), 0, False)
        return y.view(x.shape), rstd

    def rms_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        te = _transformer_engine()
        dx, dweight = te.rmsnorm_bwd(_rows(dy), _rows(x), rstd, weight, 0, False)
        return dx.view(x.shape), dweight

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        te = _transformer_engine()
        y, mean, rstd = te.layernorm_fwd(_rows(x), weight, bias, epsilon, None, None, _te_dtype(x), 0, False)
        return y.view(x.shape), mean, rstd

    def layer_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        te = _transformer_engine()
        dx, dweight, dbias = te.layernorm_bwd(_rows(dy), _rows(x), mean, rstd, weight, 0, False)
        return dx.view(x.shape), dweight, dbias


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _transformer_engine() -> Any:
    """Its extension, after the package, which loads the library that the extension links to."""
    import_module("transformer_engine.pytorch")
    return import_module("transformer_engine_torch")


def _te_dtype(x: Tensor) -> object:
    from transformer_engine.pytorch.constants import TE_DType

    return TE_DType[x.dtype]


UNFUSED = Unfused()

_RMS, _RMS_BACKWARD = Body("RMSNorm", UNFUSED.rms), Body("RMSNorm's backward", UNFUSED.rms_backward)
_LAYER, _LAYER_BACKWARD = Body("LayerNorm", UNFUSED.layer), Body("LayerNorm's backward", UNFUSED.layer_backward)

NORMS: dict[str, NormKernel] = {
    "unfused": UNFUSED,
    "compiled": Compiled(),
    "fused": Fused(),
    "apex": Apex(),
    "transformer-engine": TransformerEngine(),
}
"""By the names of --norm-backend; what each can serve stands in `megasp.config.kernels`."""
