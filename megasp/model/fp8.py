"""Products of linear layers in fp8 (arXiv 2209.05433), each operand scaled by what it holds at that moment.

    x8 = x / scale,  scale = the smallest power of two with |x8| <= the format's largest      ("dynamic" scaling)

    recipe        one scale for
    tensorwise    the whole operand
    rowwise       each row of the matrix as it enters the product: for a product over features each token or output,
                  for one over rows each feature
    blockwise     128 values of such a row; of weights blocks of 128 x 128 (DeepSeek-V3, arXiv 2412.19437)
    mxfp8         32 values of such a row (OCP Microscaling Formats 1.0; arXiv 2310.10537)

    format        forward     gradients of outputs
    hybrid        e4m3        e5m2: more range, one bit less
    e4m3          e4m3        e4m3

An operand whose scales follow the rows is cast anew for each of its two products.

Scales are powers of two, so that scaling itself rounds nothing, and a value rounds in the same way whatever else shares
its scale, as long as it is not below 2^-15 of the largest (2^-30 in e5m2), where the formats grow coarse. So
tensor-parallel ranks may each scale their own part of a weight, and batches may be cut otherwise, and products differ
by no more than that. With sequence parallelism, where parts are gathered into one operand, ranks agree on the largest
value before they cast: what is gathered is fp8, half the bytes.

A value that is not finite makes NaN of the whole product (tensorwise), or of the rows that share its scale.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from megasp.collectives import all_reduce_
from megasp.footprint import Part
from megasp.model.matmul import linear
from megasp.model.products import FEATURES, GRADIENT, INPUT, WEIGHT, Operand
from megasp.parallel_state import Axis

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_EXPONENT = {E4M3: 8, E5M2: 15}
"""The largest value of either is 1.75 times two to that power: 448 and 57344."""

SMALLEST = 2.0**-100
"""A largest value below which an operand is all but zero."""


@dataclass(frozen=True)
class Block:
    """The values that share a scale.

    Attributes:
        along: how many of those that the product sums over; None for all of them.
        across: of how many rows of the matrix as it enters the product; None for all.
        scale: dtype of the scales.
    """

    along: int | None
    across: int | None
    scale: torch.dtype = torch.float32

    def over(self, dim: int) -> tuple[int | None, int | None]:
        """Its rows and features in an operand of a product over `FEATURES` or `ROWS`."""
        return (self.across, self.along) if dim == FEATURES else (self.along, self.across)


BLOCKS = {
    "tensorwise": Block(None, None),
    "rowwise": Block(None, 1),
    "blockwise": Block(128, 1),
    "mxfp8": Block(32, 1, torch.float8_e8m0fnu),
}
"""By the names of --fp8-recipe."""

WEIGHT_BLOCKS = BLOCKS | {"blockwise": Block(128, 128)}


def power_of_two_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two by which values up to `largest` can be divided to fit the dtype; fp32, inf for NaN."""
    bits = largest.float().nan_to_num(torch.inf, torch.inf).clamp(min=SMALLEST).view(torch.int32)
    # Adding what is missing from 1.75 to 2 carries into the exponent exactly where the mantissa is above 1.75.
    rounded = (bits + 0x1FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    return rounded.mul_(2.0 ** -_EXPONENT[dtype])


def tiled(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x as a matrix in the blocks of its scales, and these: [r, R / r, f, F / f] and [r, 1, f, 1]; views."""
    scale = torch.atleast_2d(scale)
    rows, features = scale.shape
    return x.reshape(rows, -1, features, x.shape[-1] // features), scale[:, None, :, None]


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in fp8. Nothing rounds but the cast, for the scale is a power of two."""
    values, factors = tiled(x, scale.float().reciprocal().to(x.dtype))
    return (values * factors).to(dtype).view(x.shape)


def largest_values(x: Tensor, rows: int | None, features: int | None) -> Tensor:
    """The largest absolute value in each block of so many rows and features, None for all: [r, f]; [f] of all rows;
    [] of everything."""
    count, width = x.numel() // x.shape[-1], x.shape[-1]
    rows_there, features_there = rows or count, features or width
    blocks = x.reshape(count // rows_there, rows_there, width // features_there, features_there)
    largest = torch.linalg.vector_norm(blocks, torch.inf, (1, 3))
    return largest if rows else largest[0] if features else largest[0, 0]


@dataclass(frozen=True)
class Fp8:
    """Products in fp8, by PyTorch.

    Args:
        recipe: one of `BLOCKS`.
        gradient_dtype: fp8 format of gradients; all else is e4m3.
        keeps_input: keep a layer's input as it came, and cast it again in the backward.
    """

    recipe: str = "tensorwise"
    gradient_dtype: torch.dtype = E5M2
    keeps_input: bool = False

    casts_transposed = False
    """Whether one kernel casts an operand for both of its products, as they take it."""

    def block(self, of: str) -> Block:
        """What shares a scale in an operand of this kind."""
        return (WEIGHT_BLOCKS if of == WEIGHT else BLOCKS)[self.recipe]

    def dtype(self, of: str) -> torch.dtype:
        """Its format."""
        return self.gradient_dtype if of == GRADIENT else E4M3

    def cast(self, x: Tensor, *over: int, of: str = INPUT, gather: Axis | None = None) -> tuple[Operand, ...]:
        block = self.block(of)
        if block.along == block.across:
            return (self._cast(x, block, over[0], of, gather),) * len(over)
        return tuple(self._cast(x, block, dim, of, gather) for dim in over)

    def _cast(self, x: Tensor, block: Block, dim: int, of: str, gather: Axis | None) -> Operand:
        scale = self.scale(x, block, dim, of, gather)
        return Operand(quantised(x, scale, self.dtype(of)), scale)

    def scale(self, x: Tensor, block: Block, dim: int, of: str, gather: Axis | None) -> Tensor:
        """The scales of x as an operand of a product over `dim`; ranks that gather it agree on those of all rows."""
        rows, features = block.over(dim)
        largest = largest_values(x, rows, features)
        if gather is not None and rows is None:
            largest = all_reduce_(largest.float(), gather, dist.ReduceOp.MAX)
        return power_of_two_scale(largest, self.dtype(of)).to(block.scale)

    def kept(self, x: Tensor, operand: Operand) -> Operand:
        return replace(operand, values=x) if self.keeps_input else operand

    def restored(self, kept: Operand) -> Operand:
        if not self.keeps_input:
            return kept
        assert kept.scale is not None
        return replace(kept, values=quantised(kept.values, kept.scale, E4M3))

    def multiply(self, a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        left, right, shape = a.matrix, b.matrix, (*a.values.shape[:-1], b.values.shape[0])
        # As `linear`, it gives a tensor of its own, no view, which may be changed in place.
        return torch.ops.aten._unsafe_view(self._product(left, right, dtype, bias), shape)

    def _product(self, left: Operand, right: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """As `multiply`, of matrices."""
        return KERNELS[left.values.device.type](self.recipe, left, right, dtype, bias)

    def keeping_input(self, wanted: bool) -> "Fp8":
        return replace(self, keeps_input=wanted)

    def footprint(
        self, name: str, rows: int, inputs: int, outputs: int, item: int, gradient: int, gather: int = 1
    ) -> Part:
        # A cast has a scaled copy in between; what is transposed is copied. Both not where kernels do it as they cast,
        # but for what is gathered before it is transposed.
        between, turned = (0, 0) if self.casts_transposed else (item, 1)
        copies = 1 if self.recipe == "tensorwise" and turned else 2
        x8, y8 = (self._bytes(n, INPUT) for n in (rows * inputs, gather * rows * outputs))
        x, y, weight = rows * inputs * item, gather * rows * outputs * item, inputs * outputs
        weight8 = self._bytes(weight, WEIGHT)
        made = weight * (item + gradient if gradient != item and self.recipe == "rowwise" else gradient)
        gathered, dx = (gather * x8 if gather > 1 else 0), gather * x
        cast_weight = between * weight + weight8
        forward = max(copies * x8 + between * rows * inputs, copies * x8 + gathered + max(cast_weight, weight8 + y))
        held = copies * y8 + (x8 if self.keeps_input else 0) + gathered
        summed = weight8 + dx + (x if gather > 1 else 0)
        input_gradient = max(cast_weight, 2 * weight8, (1 + turned) * weight8 + dx, summed)
        x_turned = gather * x8 if turned or gather > 1 or self.keeps_input else 0
        last = held - (copies - 1) * y8 + x + turned * y8 + x_turned + made
        backward = max(copies * y8 + between * gather * rows * outputs, held + input_gradient, last)
        kept, waiting = {f"inputs of {name}, fp8": x8}, x8
        if self.keeps_input:  # which something else counts
            scales = x8 - rows * inputs
            kept, waiting = {f"scales of {name}, fp8": scales} if scales else {}, x + scales
        waiting, gradients = waiting + y8, weight * gradient
        return Part(name, y, forward, backward, kept, self.keeps_input, deferred=waiting, gradients=gradients)

    def _bytes(self, elements: int, of: str) -> int:
        """Of a cast of so many elements, a byte each, and of the scales of its blocks."""
        block = self.block(of)
        if block.along is None or block.across is None:
            return elements
        return elements + elements * block.scale.itemsize // (block.along * block.across)


def scaled_mm(recipe: str, a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """PyTorch's fp8 product of matrices [M, C] and [N, C]. Tensor cores take both with C contiguous (Hopper), so what
    is transposed is copied, a byte a value. M, N and C must be multiples of 16; with blocks, of 128. Sums are fp32's:
    `use_fast_accum`, with which Hopper keeps fewer bits, is off.
    """
    left, right = a.values.contiguous(), b.values.contiguous().t()
    (scale_a, kind_a), (scale_b, kind_b) = (_scales(recipe, operand) for operand in (a, b))
    swizzle = SwizzleType.SWIZZLE_32_4_4 if recipe == "mxfp8" else None
    # With a scale for each row the kernels write bf16 alone.
    out_dtype = torch.bfloat16 if recipe == "rowwise" else dtype
    scale_b = scale_b.t() if recipe == "rowwise" else scale_b
    scales = scale_a, kind_a, scale_b, kind_b, swizzle, swizzle
    return functional.scaled_mm(left, right, *scales, bias=bias, output_dtype=out_dtype).to(dtype)


def _scales(recipe: str, operand: Operand) -> tuple[Tensor, ScalingType]:
    """A matrix's scales where PyTorch's kernels look for them."""
    scale = operand.scale
    assert scale is not None
    if recipe == "tensorwise":
        return scale, ScalingType.TensorWise
    if recipe == "rowwise":
        return scale.flatten()[:, None], ScalingType.RowWise
    if recipe == "mxfp8":
        return swizzled(scale), ScalingType.BlockWise1x32
    if scale.shape[0] == operand.values.shape[0]:
        return scale.t().contiguous().t(), ScalingType.BlockWise1x128
    return functional.pad(scale, (0, -scale.shape[1] % 4)).contiguous().t(), ScalingType.BlockWise128x128


def swizzled(scale: Tensor) -> Tensor:
    """Scales [M, C / 32] in the order in which tensor cores read them: tiles of 128 x 4, in each the rows i, i + 32,
    i + 64 and i + 96 side by side (cuBLAS, "1D block scaling factors layout"). M is a multiple of 128, C / 32 of 4."""
    rows, columns = scale.shape
    return scale.reshape(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def emulated(recipe: str, a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """The same by the values that fp8 stands for, multiplied in fp32 or wider: for CPUs, which have no fp8 units."""
    wide = torch.promote_types(dtype, torch.float32)
    y = linear(dequantised(a, wide), dequantised(b, wide))
    return (y if bias is None else y.add_(bias)).to(dtype)


def dequantised(operand: Operand, dtype: torch.dtype) -> Tensor:
    """What an fp8 matrix stands for, in a dtype that holds it."""
    assert operand.scale is not None
    values = operand.values.to(dtype)
    blocks, factors = tiled(values, operand.scale.to(dtype))
    blocks.mul_(factors)
    return values


Kernel = Callable[[str, Operand, Operand, torch.dtype, Tensor | None], Tensor]

KERNELS: dict[str, Kernel] = {"cuda": scaled_mm, "cpu": emulated}
"""Device type -> product of two matrices by a recipe."""
