"""fp8 products against an emulation of their own: rounding to fp8's grid in fp64, and products in fp64."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.fp8 import BLOCKED_RECIPES, Fp8Config
from megasp.config.kernels import KernelFacts
from megasp.config.schema import ModelConfig
from megasp.errors import ConfigError
from megasp.model import ColumnParallelLinear, Factory, GPTModel, RowParallelLinear, fp8, linear_kernels
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.products import FEATURES, GRADIENT, INPUT, PLAIN, ROWS, WEIGHT, Operand, Products
from tests.unit.model.test_saved import saved

S, B, D, F = 64, 2, 256, 128
MANTISSA = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""fp8 format -> bits of the mantissa, exponent of the smallest normal value, largest value."""
RECIPES = ("tensorwise", "rowwise", "blockwise", "mxfp8")
FP8S = [Fp8(recipe, gradients) for recipe, gradients in itertools.product(RECIPES, (E5M2, E4M3))]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values of very different sizes, some of them zero, that fp32 holds: PyTorch casts wider ones by way of it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).double()
    return x * torch.exp2(torch.randint(-20, 3, shape, generator=generator)) * (x.abs() > 0.1)


def rounded(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """What fp8 makes of x with one scale for each block of so many rows and features, by arithmetic alone."""
    bits, smallest, most = MANTISSA[dtype]
    matrix = x.flatten(0, -2)
    groups = [
        torch.arange(size).div(length, rounding_mode="floor") for size, length in zip(matrix.shape, block, strict=True)
    ]
    number = groups[0][:, None] * (int(groups[1][-1]) + 1) + groups[1]
    largest = torch.zeros(int(number.max()) + 1, dtype=x.dtype)
    largest.scatter_reduce_(0, number.flatten(), matrix.abs().flatten(), "amax")
    scale = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=2.0**-100) / most)))[number].view(x.shape)
    exponent = torch.floor(torch.log2((x / scale).abs().clamp(min=2.0**-60))).clamp(min=smallest)
    step = torch.exp2(exponent - bits)
    return torch.round(x / scale / step) * step * scale


def over(recipe: str, dim: int, x: Tensor, of: str = INPUT) -> tuple[int, int]:
    """Rows and features that share a scale."""
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    if recipe == "tensorwise":
        return rows, features
    if recipe == "blockwise" and of == WEIGHT:
        return 128, 128
    along = {"rowwise": features if dim == FEATURES else rows, "blockwise": 128, "mxfp8": 32}[recipe]
    return (1, along) if dim == FEATURES else (along, 1)


def stands_for(operand: Operand) -> Tensor:
    return fp8.dequantised(operand.matrix, torch.float64).view(operand.values.shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scale_is_the_smallest_power_of_two(dtype: torch.dtype) -> None:
    most = MANTISSA[dtype][2]
    values = [448.0, 449.0, 1.75, 1.7500001, 57344.0, 57345.0, 1e-20, 3.1, 1.0, 1e30]
    for value in torch.tensor(values):
        scale = float(fp8.power_of_two_scale(value, dtype))
        assert math.frexp(scale)[0] == 0.5, "a power of two"
        assert most / 2 < float(value) / scale <= most
    assert float(fp8.power_of_two_scale(torch.tensor(0.0), dtype)) > 0, "of zeros, by which they can be divided"


@pytest.mark.parametrize("products", FP8S, ids=str)
def test_cast_rounds_to_the_nearest(products: Fp8) -> None:
    x = random(S, B, D)
    for dim, of in itertools.product((FEATURES, ROWS), (INPUT, WEIGHT, GRADIENT)):
        (operand,) = products.cast(x, dim, of=of)
        dtype = products.gradient_dtype if of == GRADIENT else E4M3
        want = rounded(x, dtype, over(products.recipe, dim, x, of))
        assert operand.values.dtype == dtype and operand.scale is not None
        assert operand.scale.dtype == (torch.float8_e8m0fnu if products.recipe == "mxfp8" else torch.float32)
        torch.testing.assert_close(stands_for(operand), want, rtol=0, atol=0)


def test_scaling_rounds_nothing_but_small_values() -> None:
    """A part that is scaled by itself has the same values as in the whole: layouts agree."""
    x = random(64, D, seed=3)
    x *= x.abs() > x.abs().max() * 2.0**-14
    x[:32] /= 8
    whole, part = (Fp8().cast(given, FEATURES)[0] for given in (x, x[:32]))
    assert whole.scale is not None and part.scale is not None and part.scale < whole.scale
    normal = (x[:32].abs() >= whole.scale * 2.0**-6) | (x[:32] == 0)
    a, b = whole.values[:32].double() * whole.scale, part.values.double() * part.scale
    assert torch.equal(a[normal], b[normal]) and normal.float().mean() > 0.8


def products_of(products: Fp8) -> list[tuple[Operand, Operand, Tensor | None]]:
    """The operands of y, dx and dW, and the bias of y."""
    x, weight, dy = (random(*shape, seed=i).bfloat16() for i, shape in enumerate([(S, B, D), (F, D), (S, B, F)]))
    (x_features, x_rows), (dy_features, dy_rows) = (
        products.cast(x, FEATURES, ROWS),
        products.cast(dy, FEATURES, ROWS, of=GRADIENT),
    )
    (w_features,), (w_rows,) = (products.cast(weight, dim, of=WEIGHT) for dim in (FEATURES, ROWS))
    return [
        (x_features.matrix, w_features.matrix, random(F, seed=9).bfloat16()),
        (dy_features.matrix, w_rows.transposed, None),
        (dy_rows.transposed, x_rows.transposed, None),
    ]


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="PyTorch 2.11 has this product on GPUs alone")
@pytest.mark.parametrize("products", [p for p in FP8S if p.recipe in ("tensorwise", "rowwise")], ids=str)
def test_kernels_agree(products: Fp8) -> None:
    """PyTorch's product, which a CPU has, too, and the emulation; forward, input's and weight's gradient."""
    for a, b, bias in products_of(products):
        given = products.recipe, a, b, torch.bfloat16, bias
        torch.testing.assert_close(fp8.scaled_mm(*given), fp8.emulated(*given), rtol=2.0**-7, atol=1e-6)


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """By cuBLAS' formula of where the scale of (row, column) lies."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * (columns // 4) + column // 4
    return scales[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]


def block_kernel(products: list[str]) -> Any:
    """What PyTorch's product of blocks takes on a GPU, by the checks of its source, which no CPU has."""

    def scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, swizzle_a, swizzle_b, *, bias, output_dtype):  # type: ignore[no-untyped-def]
        kind, swizzle = fp8.ScalingType, fp8.SwizzleType
        wide = []
        assert a.dtype == b.dtype == fp8.E4M3, "products of blocks take e4m3 alone"
        for matrix, scale, of in ((a, scale_a, kind_a), (b.t(), scale_b, kind_b)):
            assert matrix.is_contiguous(), "row-major by column-major"
            rows, columns = matrix.shape
            if of == kind.BlockWise1x32:
                assert swizzle_a == swizzle_b == swizzle.SWIZZLE_32_4_4 and scale.dtype == torch.float8_e8m0fnu
                assert scale.is_contiguous() and scale.numel() == rows * columns // 32
                factors = unswizzled(scale.double(), rows, columns // 32).repeat_interleave(32, 1)
            elif of == kind.BlockWise1x128:
                assert scale.shape == (rows, columns // 128) and scale.stride(0) == 1
                assert scale.stride(1) == rows or columns == 128
                factors = scale.repeat_interleave(128, 1)
            else:
                padded = -(-columns // 512) * 4
                assert of == kind.BlockWise128x128 and scale.shape == (padded, rows // 128)
                assert scale.stride(0) == 1 and (scale.stride(1) == padded or scale.shape[1] == 1)
                factors = scale.t()[:, : columns // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
            wide.append(matrix.double() * factors)
        assert {kind_a, kind_b} != {kind.BlockWise128x128}, "Hopper has no product of two such"
        products.append(kind_b.name)
        y = wide[0] @ wide[1].t()
        return (y if bias is None else y + bias).to(output_dtype)

    return scaled_mm


def test_scales_of_squares_that_need_no_padding() -> None:
    """As the kernel wants them, first dim contiguous, where the matrix is a transposed view, too."""
    (operand,) = Fp8("blockwise", E4M3).cast(random(512, 1024).bfloat16(), ROWS, of=WEIGHT)
    scale, _ = fp8._scales("blockwise", operand.transposed)
    assert scale.shape == (4, 8) and scale.stride(0) == 1


def test_any_nan_makes_the_scale_infinite() -> None:
    nans = torch.tensor([0x7FC00000, 0x7FE00001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert fp8.power_of_two_scale(nans, E4M3).isinf().all()


@pytest.mark.parametrize("products", [Fp8(recipe, E4M3) for recipe in BLOCKED_RECIPES], ids=str)
def test_blocks_as_kernels_take_them(products: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", block_kernel(kinds))
    for (a, b, bias), dtype in zip(products_of(products), (torch.bfloat16, torch.bfloat16, torch.float32), strict=True):
        given = products.recipe, a, b, dtype, bias
        want = fp8.emulated(*given)
        torch.testing.assert_close(fp8.scaled_mm(*given), want, rtol=2.0**-7, atol=1e-6 * float(want.abs().max()))
    square, row = "BlockWise128x128", "BlockWise1x128"
    assert kinds == ([square, square, row] if products.recipe == "blockwise" else ["BlockWise1x32"] * 3)


@pytest.mark.parametrize("products", FP8S, ids=str)
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_linear_layer(kind: type, products: Fp8) -> None:
    layer = kind(D, F, factory=Factory(dtype=torch.float64), products=products)
    x, dy = random(S, B, D).requires_grad_(), random(S, B, F, seed=1)
    with torch.no_grad():
        layer.weight.copy_(random(F, D, seed=2))
        layer.bias.copy_(random(F, seed=3))
    y = layer(x)
    y.backward(dy)

    def cast(given: Tensor, dim: int, of: str = INPUT) -> Tensor:
        dtype = products.gradient_dtype if of == GRADIENT else E4M3
        return rounded(given.detach(), dtype, over(products.recipe, dim, given, of)).reshape(-1, given.shape[-1])

    weight = layer.weight
    want = {
        "y": (cast(x, FEATURES) @ cast(weight, FEATURES, WEIGHT).t()).view(S, B, F) + layer.bias,
        "dx": (cast(dy, FEATURES, GRADIENT) @ cast(weight, ROWS, WEIGHT)).view(S, B, D),
        "dw": cast(dy, ROWS, GRADIENT).t() @ cast(x, ROWS),
        "db": dy.sum((0, 1)),
    }
    for name, got in {"y": y, "dx": x.grad, "dw": weight.grad, "db": layer.bias.grad}.items():
        torch.testing.assert_close(
            got, want[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_layer_keeps(recipe: str) -> None:
    """The input in fp8; or the input as it came, which the backward casts to the same."""
    x = random(S, B, D).float().requires_grad_()
    results = []
    for keeps_input in (False, True):
        layer = ColumnParallelLinear(D, F, products=Fp8(recipe, keeps_input=keeps_input))
        kept = [t for t in saved(lambda layer=layer: layer(x)) if t.data_ptr() != layer.weight.data_ptr()]
        values = max(kept, key=lambda t: t.numel())
        assert values.shape == x.shape and (values.data_ptr() == x.data_ptr()) == keeps_input
        assert values.dtype == (torch.float32 if keeps_input else E4M3) and len(kept) == 2, "and a scale"
        results.append(torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = random(S, B, D).float()
    x[1, 0, 5] = value
    assert torch.isnan(ColumnParallelLinear(D, F, products=Fp8())(x)).all()
    for recipe in ("rowwise", "blockwise", "mxfp8"):
        y = ColumnParallelLinear(D, F, products=Fp8(recipe))(x)
        assert torch.isnan(y[1, 0]).all() and torch.isfinite(y[2:]).all(), "its own row"


def trained(products: Products, steps: int = 30) -> list[float]:
    """Losses of a small model on the same few samples."""
    config = ModelConfig(
        num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=256, vocab_size=256, swiglu=True,
        add_bias_linear=False, position_embedding_type="rope", normalization="RMSNorm",
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(config, products=lambda number: products, factory=Factory(dtype=torch.bfloat16, seed=1))
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (4 * 32)
        loss.backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad, p.grad = p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        losses.append(float(loss.detach()))
    return losses


def test_trains_as_bf16_does() -> None:
    plain = trained(PLAIN)
    for recipe in RECIPES:
        assert trained(Fp8(recipe)) == pytest.approx(plain, rel=0.02)
    assert plain[-1] < 0.7 * plain[0]


def test_layers_by_the_ends() -> None:
    ends = Fp8Config(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    made = [linear_kernels.products(ends, n, 6) for n in range(6)]
    assert made == [PLAIN, *[Fp8("tensorwise", E5M2)] * 3, PLAIN, PLAIN]
    assert linear_kernels.products(Fp8Config(), 0, 6) is PLAIN
    said = linear_kernels.describe(ends, 6, torch.device("cpu"))
    assert "layers 1 to 3" in said and "e5m2 gradients" in said and "emulated on a CPU" in said


CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU by hearsay; its capability, and the version of Transformer Engine, may be changed."""
    facts: dict[str, Any] = {"capability": (9, 0), "version": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(KernelFacts, "installed", property(lambda kernel: facts["version"] is not None))
    monkeypatch.setattr(linear_kernels.importlib.metadata, "version", lambda name: facts["version"])
    return facts


@pytest.mark.parametrize(
    ("capability", "version", "recipe", "backend", "chosen"),
    [
        ((8, 9), None, "tensorwise", "auto", "torch"),
        ((9, 0), "2.20.2", "tensorwise", "auto", "torch"),
        ((9, 0), "2.20.2", "tensorwise", "transformer-engine", "transformer-engine"),
        ((9, 0), "2.20.2", "blockwise", "auto", "transformer-engine"),
        ((10, 0), "2.20.2", "blockwise", "auto", "transformer-engine"),
        ((10, 0), "2.20.2", "mxfp8", "auto", "transformer-engine"),
    ],
)
def test_backend(
    gpu: dict[str, Any], capability: tuple[int, int], version: str | None, recipe: str, backend: str, chosen: str
) -> None:
    gpu.update(capability=capability, version=version)
    config = Fp8Config(fp8_format="hybrid", fp8_recipe=recipe, fp8_backend=backend)
    assert linear_kernels.choose(config, CUDA) == chosen
    said = linear_kernels.describe(config, 2, CUDA)
    assert f"by {chosen} ({'auto' if backend == 'auto' else '--fp8-backend'}" in said
    assert ("of torch, PyTorch's products with scales of blocks take e4m3 alone" in said) == (recipe in BLOCKED_RECIPES)


@pytest.mark.parametrize(
    ("capability", "version", "recipe", "backend", "said"),
    [
        ((8, 0), None, "tensorwise", "auto", r"compute capability 8\.0: torch: .* 8\.9 or higher; .* use --bf16 alone"),
        ((9, 0), None, "mxfp8", "auto", r"need compute capability 10\.0 or higher; .* or rowwise or blockwise"),
        ((10, 0), None, "blockwise", "auto", r"9\.0 up to below 10\.0; transformer-engine: it is not installed here"),
        ((10, 0), "2.5.0", "blockwise", "auto", r"transformer-engine: it must be 2\.20 or later, not 2\.5\.0"),
        ((9, 0), None, "tensorwise", "transformer-engine", r"not installed here .* use --fp8-backend auto"),
        ((12, 0), "2.20.2", "mxfp8", "transformer-engine", r"10\.0 up to below 12\.0; use --fp8-backend auto"),
    ],
)
def test_machines_without_it_are_refused(
    gpu: dict[str, Any], capability: tuple[int, int], version: str | None, recipe: str, backend: str, said: str
) -> None:
    gpu.update(capability=capability, version=version)
    with pytest.raises(ConfigError, match=said):
        linear_kernels.choose(Fp8Config(fp8_format="e4m3", fp8_recipe=recipe, fp8_backend=backend), CUDA)


def test_blocks_need_a_new_cublas(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert list(linear_kernels.recipes(CUDA)) == ["tensorwise", "rowwise"]
    with pytest.raises(ConfigError, match=r"torch: blockwise products need CUDA 12\.9 or later, not 12\.8"):
        linear_kernels.choose(Fp8Config(fp8_format="e4m3", fp8_recipe="blockwise"), CUDA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert list(linear_kernels.recipes(CUDA)) == ["tensorwise", "rowwise", "blockwise"]


def test_other_devices(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_kernels.choose(Fp8Config(fp8_format="e4m3"), torch.device("cpu")) == "torch"
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    with pytest.raises(ConfigError, match="AMD"):
        linear_kernels.choose(Fp8Config(fp8_format="e4m3"), CUDA)
