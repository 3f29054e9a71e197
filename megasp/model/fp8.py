"""Products of linear layers in fp8 (arXiv 2209.05433), each operand scaled by what it holds at that moment.

    x8 = x / scale,  scale = the smallest power of two with |x8| <= the format's largest      ("dynamic" scaling)

    recipe        one scale for
    tensorwise    the whole operand
    rowwise       each row of the matrix as it enters the product: for a product over features each token or output,
                  for one over rows each feature; so an operand is cast anew for each of its two products

    format        forward     gradients of outputs
    hybrid        e4m3        e5m2: more range, one bit less
    e4m3          e4m3        e4m3

Scales are powers of two, so that scaling itself rounds nothing, and a value rounds in the same way whatever else shares
its scale, as long as it is not below 2^-15 of the largest (2^-30 in e5m2), where the formats grow coarse. So
tensor-parallel ranks may each scale their own part of a weight, and batches may be cut otherwise, and products differ
by no more than that. With sequence parallelism, where parts are gathered into one operand, ranks agree on the largest
value before they cast: what is gathered is fp8, half the bytes.

A value that is not finite makes the whole product NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megasp.collectives import all_reduce_
from megasp.config.fp8 import Fp8Config
from megasp.errors import ConfigError
from megasp.footprint import Part
from megasp.model.matmul import linear
from megasp.model.products import FEATURES, PLAIN, Operand, Products
from megasp.parallel_state import Axis

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_EXPONENT = {E4M3: 8, E5M2: 15}
"""The largest value of either is 1.75 times two to that power: 448 and 57344."""

SMALLEST = 2.0**-100
"""A largest value below which an operand is all but zero."""

MIN_CAPABILITY = (8, 9)
"""Compute capability of the first NVIDIA GPUs whose tensor cores multiply fp8 (Ada; Hopper is 9.0)."""


def power_of_two_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two by which values up to `largest` can be divided to fit the dtype; fp32, inf for NaN."""
    bits = largest.float().clamp(min=SMALLEST).view(torch.int32)
    # Adding what is missing from 1.75 to 2 carries into the exponent exactly where the mantissa is above 1.75.
    rounded = (bits + 0x1FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    return rounded.mul_(2.0 ** -_EXPONENT[dtype])


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in fp8. Nothing rounds but the cast, for the scale is a power of two."""
    return (x * scale.reciprocal().to(x.dtype)).to(dtype)


@dataclass(frozen=True)
class Fp8:
    """Products in fp8.

    Args:
        recipe: "tensorwise" or "rowwise".
        gradient_dtype: fp8 format of gradients; all else is e4m3.
        keeps_input: keep a layer's input as it came, and cast it again in the backward.
    """

    recipe: str = "tensorwise"
    gradient_dtype: torch.dtype = E5M2
    keeps_input: bool = False

    def cast(self, x: Tensor, *over: int, gradient: bool = False, gather: Axis | None = None) -> tuple[Operand, ...]:
        dtype = self.gradient_dtype if gradient else E4M3
        if self.recipe == "rowwise":
            return tuple(self._cast(x, dtype, None if dim == FEATURES else gather, dim) for dim in over)
        return (self._cast(x, dtype, gather),) * len(over)

    def _cast(self, x: Tensor, dtype: torch.dtype, gather: Axis | None, over: int | None = None) -> Operand:
        if over is None:
            largest = torch.linalg.vector_norm(x, torch.inf)
        elif over == FEATURES:
            largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True)
        else:
            largest = torch.linalg.vector_norm(x, torch.inf, tuple(range(x.dim() - 1)))
        if gather is not None:
            largest = all_reduce_(largest.float(), gather, dist.ReduceOp.MAX)
        scale = power_of_two_scale(largest, dtype)
        return Operand(quantised(x, scale, dtype), scale)

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
        return torch.ops.aten._unsafe_view(KERNELS[a.values.device.type](left, right, dtype, bias), shape)

    def keeping_input(self, wanted: bool) -> "Fp8":
        return replace(self, keeps_input=wanted)

    def footprint(
        self, name: str, rows: int, inputs: int, outputs: int, item: int, gradient: int, gather: int = 1
    ) -> Part:
        # In fp8 an element is a byte. A cast has a scaled copy in between; what is transposed is copied.
        x, y, weight = rows * inputs, gather * rows * outputs, inputs * outputs
        made = weight * (gradient if gradient == item or self.recipe == "tensorwise" else item + gradient)
        copies = 2 if self.recipe == "rowwise" else 1
        gathered, dx = gather * x if gather > 1 else 0, gather * x * item
        cast_weight = item * weight + weight
        forward = max((copies + item) * x, copies * x + gathered + max(cast_weight, weight + y * item))
        held = (copies * y) + (x if self.keeps_input else 0) + gathered
        input_gradient = max(cast_weight, 2 * weight + dx, weight + dx + (x * item if gather > 1 else 0))
        last = held - (copies - 1) * y + x * item + y + gather * x + made
        backward = max((copies + item) * y, held + input_gradient, last)
        kept, waiting = ({}, x * item) if self.keeps_input else ({f"inputs of {name}, fp8": x}, x)
        return Part(
            name,
            y * item,
            forward,
            backward,
            kept,
            keeps_input=self.keeps_input,
            deferred=waiting + y,
            gradients=weight * gradient,
        )


def scaled_mm(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """PyTorch's fp8 product of matrices [M, C] and [N, C]. Tensor cores take both with C contiguous (Hopper), so what
    is transposed is copied, a byte a value. M, N and C must be multiples of 16. Sums are fp32's: `use_fast_accum`, with
    which Hopper keeps fewer bits, is off.
    """
    assert a.scale is not None and b.scale is not None
    right_scale = b.scale if b.scale.dim() == 0 else b.scale.t()
    left, right = a.values.contiguous(), b.values.contiguous().t()
    # With a scale for each row the kernels write bf16 alone.
    out_dtype = dtype if a.scale.dim() == 0 else torch.bfloat16
    return torch._scaled_mm(left, right, a.scale, right_scale, bias=bias, out_dtype=out_dtype).to(dtype)


def emulated(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """The same by the values that fp8 stands for, multiplied in fp32 or wider: for CPUs, which have no fp8 units."""
    wide = torch.promote_types(dtype, torch.float32)
    assert a.scale is not None and b.scale is not None
    y = linear(a.values.to(wide), b.values.to(wide))
    y = y.mul_(a.scale.to(wide)).mul_(b.scale.to(wide).t() if b.scale.dim() else b.scale.to(wide))
    return (y if bias is None else y.add_(bias)).to(dtype)


Kernel = Callable[[Operand, Operand, torch.dtype, Tensor | None], Tensor]

KERNELS: dict[str, Kernel] = {"cuda": scaled_mm, "cpu": emulated}
"""Device type -> product of two matrices."""


def products(config: Fp8Config, layer: int, layers: int) -> Products:
    """Those of one of a model's `layers` layers."""
    if layer not in config.layers(layers):
        return PLAIN
    return Fp8(config.recipe, E5M2 if config.fp8_format == "hybrid" else E4M3)


def describe(config: Fp8Config, layers: int, device: torch.device) -> str:
    """One line for a person."""
    own = config.layers(layers)
    gradients = "e5m2" if config.fp8_format == "hybrid" else "e4m3"
    where = "all layers" if len(own) == layers else f"layers {own.start} to {own.stop - 1}"
    how = "" if device.type == "cuda" else "; emulated on a CPU: the same numbers, and slower than bfloat16"
    return f"linear layers of {where}, e4m3 forward, {gradients} gradients, {config.recipe} scales{how}"


def check_device(device: torch.device) -> None:
    """Refuse a GPU that has no fp8 units of the formats used here.

    Raises:
        ConfigError: it is older than Ada, or not NVIDIA's.
    """
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        raise ConfigError(f"--fp8-format on {name}", "AMD GPUs have fp8 formats of their own", "use --bf16 alone")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ConfigError(
            f"--fp8-format on {name}, compute capability {'.'.join(map(str, capability))}",
            f"fp8 needs {'.'.join(map(str, MIN_CAPABILITY))} or higher (Ada, Hopper, Blackwell)",
            "use --bf16 alone",
        )
