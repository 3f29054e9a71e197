"""Linear layers in fp8 on a CUDA device: right against an emulation, and how much faster than bf16.

    python -m benchmarks.gpu.fp8 [--tokens 8192] [--steps 10]

First the three products of a layer against PyTorch's casts multiplied in fp32, by every backend that is installed, in
every recipe that the GPU has and in both formats: the largest error relative to the largest value (bf16 rounds at
4e-3), and with `use_fast_accum`, which megasp leaves off. Then TFLOP/s, forward and backward, of the linear layers of
Llama 3 8B and 70B in bf16 and fp8, with all casts and copies; of the product alone; and of the norms that are
installed, against the reference. Without a CUDA device that multiplies fp8 it says so and ends.
"""

import argparse
import itertools
from collections.abc import Mapping
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.attention import milliseconds
from megasp.config.kernels import NORM_KERNELS
from megasp.model import ColumnParallelLinear, Factory, fp8, linear_kernels
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.norm import Norm
from megasp.model.norm_kernels import NORMS
from megasp.model.products import FEATURES, GRADIENT, PLAIN, ROWS, WEIGHT, Operand, Products

SHAPES = {
    "8B q, k, v": (4096, 6144),
    "8B gate, up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B gate, up, a rank of 8": (8192, 7168),
}
"""Layer -> inputs, outputs."""


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def products_of(products: Fp8, tokens: int, inputs: int, outputs: int) -> dict[str, tuple[Operand, Operand]]:
    """The operands of y, dx and dW."""
    x, weight, dy = values(tokens, inputs), values(outputs, inputs, seed=1), values(tokens, outputs, seed=2)
    x_features, x_rows = products.cast(x, FEATURES, ROWS)
    dy_features, dy_rows = products.cast(dy, FEATURES, ROWS, of=GRADIENT)
    (w_features,), (w_rows,) = (products.cast(weight, dim, of=WEIGHT) for dim in (FEATURES, ROWS))
    return {
        "y": (x_features.matrix, w_features.matrix),
        "dx": (dy_features.matrix, w_rows.transposed),
        "dW": (dy_rows.transposed, x_rows.transposed),
    }


def fast(products: Fp8, a: Operand, b: Operand) -> Tensor:
    """PyTorch's product whose sums keep fewer bits."""
    fast_mm = partial(functional.scaled_mm, use_fast_accum=True)
    with mock.patch.object(functional, "scaled_mm", fast_mm):
        return products.multiply(a, b, torch.bfloat16)


def check(backend: str, products: Fp8) -> None:
    errors = {}
    reference = products_of(Fp8(products.recipe, products.gradient_dtype), 512, 1024, 768)
    for name, (a, b) in products_of(products, 512, 1024, 768).items():
        want = fp8.emulated(products.recipe, *reference[name], torch.float32)
        kinds = {"": products.multiply(a, b, torch.bfloat16)}
        if backend == "torch" and products.recipe in ("tensorwise", "rowwise"):
            kinds[" fast"] = fast(products, a, b)
        for kind, got in kinds.items():
            errors[name + kind] = float((got.float() - want).abs().max() / want.abs().max())
    shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    exact = max(error for name, error in errors.items() if "fast" not in name)
    print(f"{label(backend, products):30} {shown}  {'ok' if exact < 1e-2 else 'WRONG'}")


def label(backend: str, products: Fp8) -> str:
    return f"{backend} {products.recipe} {str(products.gradient_dtype).removeprefix('torch.float8_')}"


def layer_speed(products: Products, tokens: int, inputs: int, outputs: int, steps: int) -> tuple[float, float]:
    """TFLOP/s of a layer's forward and of its backward."""
    factory = Factory(torch.device("cuda"), torch.bfloat16)
    layer = ColumnParallelLinear(inputs, outputs, bias=False, factory=factory, products=products)
    x, dy = values(tokens, 1, inputs).requires_grad_(), values(tokens, 1, outputs, seed=2)
    forward = milliseconds(lambda: layer(x), steps)
    y = layer(x)
    backward = milliseconds(lambda: torch.autograd.grad(y, [x, layer.weight], dy, retain_graph=True), steps)
    operations = 2 * tokens * inputs * outputs / 1e9
    return operations / forward, 2 * operations / backward


def product_speed(kinds: Mapping[str, Products], tokens: int, inputs: int, outputs: int, steps: int) -> str:
    """TFLOP/s of the forward's product alone."""
    x, weight = values(tokens, inputs), values(outputs, inputs, seed=1)
    shown = [f"bf16 {rate(milliseconds(lambda: x @ weight.t(), steps), tokens, inputs, outputs):7.1f}"]
    for name, products in kinds.items():
        if isinstance(products, Fp8):
            a, b = products_of(products, tokens, inputs, outputs)["y"]
            spent = milliseconds(partial(products.multiply, a, b, torch.bfloat16), steps)
            shown.append(f"{name} {rate(spent, tokens, inputs, outputs):7.1f}")
    return "   ".join(shown)


def rate(spent: float, tokens: int, inputs: int, outputs: int) -> float:
    return 2 * tokens * inputs * outputs / spent / 1e9


def norm_speed(kind: str, name: str, tokens: int, steps: int) -> None:
    norm = Norm(kind, 4096, factory=Factory(torch.device("cuda"), torch.bfloat16), kernel=NORMS[name])
    reference = Norm(kind, 4096, factory=Factory(torch.device("cuda"), torch.bfloat16))
    x, dy = values(tokens, 4096).requires_grad_(), values(tokens, 4096, seed=1)

    def both(norm: Norm) -> list[Tensor]:
        y = norm(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], dy)]

    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(both(norm), both(reference), strict=True)]
    spent = milliseconds(lambda: both(norm), steps)
    moved = 5 * x.nbytes / spent / 1e9  # x twice, dy, y, dx
    print(f"{kind:10} {name:18} largest error {max(errors):.1e}   {spent:7.3f} ms   {moved:6.2f} TB/s")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--steps", type=int, default=10)
    a = p.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device")
        return
    served = linear_kernels.recipes(torch.device("cuda"))
    if not served:
        print(f"skipped: {torch.cuda.get_device_name()} has no fp8")
        return
    every = [(backend, recipe) for recipe, backends in served.items() for backend in backends]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n\nlargest error, by product")
    for (backend, recipe), gradients in itertools.product(every, (E5M2, E4M3)):
        check(backend, linear_kernels.FP8[backend](recipe, gradients))
    print(f"\nTFLOP/s of a layer on {a.tokens} tokens: forward, backward")
    kinds: dict[str, Products] = {"bf16": PLAIN}
    kinds |= {f"{backend} {recipe}": linear_kernels.FP8[backend](recipe) for backend, recipe in every}
    for name, (inputs, outputs) in SHAPES.items():
        for kind, products in kinds.items():
            forward, backward = layer_speed(products, a.tokens, inputs, outputs, a.steps)
            print(f"{name:26} {kind:29} {forward:7.1f} {backward:7.1f}")
    print("\nTFLOP/s of the forward's product alone")
    for name, (inputs, outputs) in SHAPES.items():
        print(f"{name:26} {product_speed(kinds, a.tokens, inputs, outputs, a.steps)}")
    print("\nnorms, forward and backward")
    for kind, name in itertools.product(("RMSNorm", "LayerNorm"), [n for n, f in NORM_KERNELS.items() if f.installed]):
        norm_speed(kind, name, a.tokens, a.steps)


if __name__ == "__main__":
    main()
