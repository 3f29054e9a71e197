"""Linear layers in fp8 on a CUDA device: right against an emulation, and how much faster than bf16.

    python -m benchmarks.gpu.fp8 [--tokens 8192] [--steps 10]

First the three products of a layer by PyTorch's kernel against the same fp8 values multiplied in fp32, every recipe and
format: the largest error relative to the largest value (bf16 rounds at 4e-3), and with `use_fast_accum`, which megasp
leaves off. Then TFLOP/s, forward and backward, of the linear layers of Llama 3 8B and 70B in bf16 and fp8, with all
casts and copies; of the product alone; and of PyTorch's norms against the reference. Without a CUDA device that
multiplies fp8 it says so and ends.
"""

import argparse
import itertools
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.attention import milliseconds
from megasp.errors import ConfigError
from megasp.model import ColumnParallelLinear, Factory, fp8
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.norm import Norm
from megasp.model.norm_kernels import NORMS
from megasp.model.products import FEATURES, PLAIN, ROWS, Operand, Products

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
    dy_features, dy_rows = products.cast(dy, FEATURES, ROWS, gradient=True)
    (w_features,), (w_rows,) = products.cast(weight, FEATURES), products.cast(weight, ROWS)
    return {
        "y": (x_features.matrix, w_features.matrix),
        "dx": (dy_features.matrix, w_rows.transposed),
        "dW": (dy_rows.transposed, x_rows.transposed),
    }


def fast(a: Operand, b: Operand) -> Tensor:
    """The product whose sums keep fewer bits."""
    scaled_mm = torch._scaled_mm

    def with_fast_sums(*given: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return scaled_mm(*given, bias=bias, out_dtype=out_dtype, use_fast_accum=True)

    with mock.patch.object(torch, "_scaled_mm", with_fast_sums):
        return fp8.scaled_mm(a, b, torch.bfloat16)


def check(products: Fp8) -> None:
    errors = {}
    for name, (a, b) in products_of(products, 512, 1024, 768).items():
        want = fp8.emulated(a, b, torch.float32)
        for kind, got in (("", fp8.scaled_mm(a, b, torch.bfloat16)), (" fast", fast(a, b))):
            errors[name + kind] = float((got.float() - want).abs().max() / want.abs().max())
    shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    exact = max(error for name, error in errors.items() if "fast" not in name)
    print(f"{products.recipe:11} {str(products.gradient_dtype)[6:]:14} {shown}  {'ok' if exact < 1e-2 else 'WRONG'}")


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


def product_speed(tokens: int, inputs: int, outputs: int, steps: int) -> str:
    """TFLOP/s of the forward's product alone."""
    x, weight = values(tokens, inputs), values(outputs, inputs, seed=1)
    shown = [f"bf16 {rate(milliseconds(lambda: x @ weight.t(), steps), tokens, inputs, outputs):7.1f}"]
    for recipe in ("tensorwise", "rowwise"):
        a, b = products_of(Fp8(recipe), tokens, inputs, outputs)["y"]
        for kind, run in (("", partial(fp8.scaled_mm, a, b, torch.bfloat16)), (" fast", partial(fast, a, b))):
            shown.append(f"{recipe}{kind} {rate(milliseconds(run, steps), tokens, inputs, outputs):7.1f}")
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
    print(f"{kind:10} {name:8} largest error {max(errors):.1e}   {spent:7.3f} ms   {moved:6.2f} TB/s")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--steps", type=int, default=10)
    a = p.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device")
        return
    try:
        fp8.check_device(torch.device("cuda"))
    except ConfigError as error:
        print(f"skipped: {error}")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n\nlargest error, by product")
    for recipe, gradients in itertools.product(("tensorwise", "rowwise"), (E5M2, E4M3)):
        check(Fp8(recipe, gradients))
    print(f"\nTFLOP/s of a layer on {a.tokens} tokens: forward, backward")
    kinds: dict[str, Products] = {"bf16": PLAIN, "tensorwise": Fp8("tensorwise"), "rowwise": Fp8("rowwise")}
    for name, (inputs, outputs) in SHAPES.items():
        for kind, products in kinds.items():
            forward, backward = layer_speed(products, a.tokens, inputs, outputs, a.steps)
            print(f"{name:26} {kind:11} {forward:7.1f} {backward:7.1f}")
    print("\nTFLOP/s of the forward's product alone")
    for name, (inputs, outputs) in SHAPES.items():
        print(f"{name:26} {product_speed(a.tokens, inputs, outputs, a.steps)}")
    print("\nnorms, forward and backward")
    for kind, name in itertools.product(("RMSNorm", "LayerNorm"), ("unfused", "fused")):
        norm_speed(kind, name, a.tokens, a.steps)


if __name__ == "__main__":
    main()
