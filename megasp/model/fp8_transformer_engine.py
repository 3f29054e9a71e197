"""fp8 products by NVIDIA's Transformer Engine: its kernels cast an operand for both of its products in one pass over
it, and its products (cuBLASLt) take what they give. Scales are the powers of two of `fp8.py`: for the whole operand
they are computed there, those of blocks by the package, by the same rule.

What is used is the level below its modules, quantizers and `general_gemm`. Its modules would own weights, collectives,
and what is saved; here operands stay plain tensors, gathered, kept and put off as those of PyTorch's products.

It has never been run; it was written from version 2.20.2. Tests put a small package in its place that checks what it is
passed, and computes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megasp.model.fp8 import E4M3, Fp8
from megasp.model.products import FEATURES, INPUT, ROWS, WEIGHT, Operand
from megasp.parallel_state import Axis


class TransformerEngineFp8(Fp8):
    """`Fp8` by Transformer Engine, of the recipes tensorwise, blockwise and mxfp8."""

    casts_transposed = True

    def cast(self, x: Tensor, *over: int, of: str = INPUT, gather: Axis | None = None) -> tuple[Operand, ...]:
        rows, dtype, block = x.contiguous().view(-1, x.shape[-1]), self.dtype(of), self.block(of)
        # Casts that serve both products with the same scales always write the one by features.
        by_features = FEATURES in over or block.along == block.across
        # What is gathered over dim 0 is not stored transposed, where both have one scale.
        by_rows = ROWS in over and not (gather is not None and self.recipe == "tensorwise")
        operands: dict[int, Operand] = {}
        if self.recipe == "tensorwise":
            scale = self.scale(x, block, FEATURES, of, gather)
            cast = self._quantizer(of, by_features, by_rows, scale)(rows)
            operands[FEATURES] = operands[ROWS] = Operand(cast._data.view(dtype).view(x.shape), scale)
            if cast._transpose is not None:  # Hopper: it multiplies along contiguous dims alone
                operands[ROWS] = Operand(cast._transpose.view(dtype).t().view(x.shape), scale)
            return tuple(operands[dim] for dim in over)
        cast = self._quantizer(of, by_features, by_rows)(rows)
        if by_features:
            scale = self._compact(cast._rowwise_scale_inv, of, rows.shape[1], transposed=False)
            operands[FEATURES] = Operand(cast._rowwise_data.view(dtype).view(x.shape), scale)
        if by_rows:
            scale = self._compact(cast._columnwise_scale_inv, of, rows.shape[0], transposed=True)
            values = cast._columnwise_data.view(dtype)
            operands[ROWS] = Operand((values if self.recipe == "mxfp8" else values.t()).view(x.shape), scale)
        return tuple(operands[dim] for dim in over)

    def _quantizer(self, of: str, by_features: bool, by_rows: bool, scale: Tensor | None = None) -> Any:
        """What casts a matrix for products over its features, over its rows, or both."""
        import transformer_engine.pytorch as te

        usage: dict[str, Any] = {"rowwise": by_features, "columnwise": by_rows}
        dtype = _dtype(self.dtype(of))
        if scale is not None:
            quantizer = te.Float8Quantizer(scale.reciprocal().view(1), torch.zeros_like(scale).view(1), dtype, **usage)
        elif self.recipe == "mxfp8":
            quantizer = te.MXFP8Quantizer(dtype, **usage)
        else:
            dims = 2 if of == WEIGHT else 1
            quantizer = te.Float8BlockQuantizer(dtype, **usage, force_pow_2_scales=True, block_scaling_dim=dims)
        quantizer.internal = True  # plain storage in place of a subclass of tensors
        return quantizer

    def _compact(self, scale: Tensor, of: str, summed: int, transposed: bool) -> Tensor:
        """Scales [r, f] of a cast's blocks, as views of where the package writes them.

        Args:
            summed: how many values the product sums over, some of whose blocks' scales may be followed by padding.
            transposed: the cast is for products over rows.
        """
        if self.recipe == "mxfp8":
            return scale.view(torch.float8_e8m0fnu)
        if of == WEIGHT:
            scale = scale[:, : summed // 128]
            return scale.t() if transposed else scale
        return scale if transposed else scale.t()

    def _product(self, left: Operand, right: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        # In the package's words, of column-major BLAS, `right` comes first, and is transposed where it is [N, C].
        (a, a_layout), (b, b_layout) = (self._stored(operand) for operand in (right, left))
        layout = a_layout + {"T": "N", "N": "T"}[b_layout]
        y, *_ = general_gemm(a, b, out_dtype=dtype, layout=layout, bias=bias, use_split_accumulator=True)
        return y

    def _stored(self, operand: Operand) -> tuple[Any, str]:
        """A matrix [M, C] as the package takes it: "T", by rows; or "N", as the [C, M] that it is a transposed view of,
        which mxfp8 takes as it is, and others as a transposed copy."""
        import transformer_engine.pytorch as te

        values, scale = operand.values, operand.scale
        assert scale is not None
        facts: dict[str, Any] = {"fp8_dtype": _dtype(values.dtype), "quantizer": None, "fake_dtype": torch.bfloat16}
        if self.recipe == "mxfp8":
            by_rows = values.is_contiguous()
            values, scale = (values, scale) if by_rows else (values.t(), scale.t())
            stored = _bytes(values), _bytes(scale)
            given = (*stored, None, None) if by_rows else (None, None, *stored)
            names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
            facts |= {"with_gemm_swizzled_scales": False}
            return te.MXFP8TensorStorage(**dict(zip(names, given, strict=True)), **facts), "T" if by_rows else "N"
        data = _bytes(values)
        if self.recipe == "tensorwise":
            return te.Float8TensorStorage(data=data, fp8_scale_inv=scale.view(1), **facts), "T"
        squares = len(scale) < len(values)
        scale = functional.pad(scale, (0, -scale.shape[1] % 4)) if squares else scale.t()
        facts |= {"columnwise_data": None, "columnwise_scale_inv": None, "is_2D_scaled": squares}
        return te.Float8BlockwiseQTensorStorage(data, scale.contiguous(), **facts), "T"


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _dtype(dtype: torch.dtype) -> Any:
    import transformer_engine.pytorch as te

    return te.DType.kFloat8E4M3 if dtype == E4M3 else te.DType.kFloat8E5M2
