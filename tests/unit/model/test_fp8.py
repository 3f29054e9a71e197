"""fp8 products against an emulation of their own: rounding to fp8's grid in fp64, and products in fp64."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.fp8 import Fp8Config
from megasp.config.schema import ModelConfig
from megasp.errors import ConfigError
from megasp.model import ColumnParallelLinear, Factory, GPTModel, RowParallelLinear, fp8
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.products import FEATURES, PLAIN, ROWS, Products
from tests.unit.model.test_saved import saved

S, B, D, F = 8, 2, 32, 48
MANTISSA = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""fp8 format -> bits of the mantissa, exponent of the smallest normal value, largest value."""
FP8S = [Fp8(recipe, gradients) for recipe, gradients in itertools.product(("tensorwise", "rowwise"), (E5M2, E4M3))]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * torch.exp2(torch.randint(-20, 3, shape, generator=generator)) * (x.abs() > 0.1)


def rounded(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    """What fp8 makes of x with one scale over `dims`, by arithmetic alone."""
    bits, smallest, most = MANTISSA[dtype]
    largest = x.abs().amax(dims, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / most)))
    exponent = torch.floor(torch.log2((x / scale).abs().clamp(min=2.0**-60))).clamp(min=smallest)
    step = torch.exp2(exponent - bits)
    return torch.round(x / scale / step) * step * scale


def over(recipe: str, dim: int, x: Tensor) -> tuple[int, ...]:
    everything = tuple(range(x.dim()))
    return everything if recipe == "tensorwise" else everything[-1:] if dim == FEATURES else everything[:-1]


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
    for dim, gradient in itertools.product((FEATURES, ROWS), (False, True)):
        (operand,) = products.cast(x, dim, gradient=gradient)
        dtype = products.gradient_dtype if gradient else E4M3
        want = rounded(x, dtype, over(products.recipe, dim, x))
        assert operand.values.dtype == dtype and operand.scale is not None
        torch.testing.assert_close(operand.values.double() * operand.scale, want, rtol=0, atol=0)


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


@pytest.mark.parametrize("products", FP8S, ids=str)
def test_kernels_agree(products: Fp8) -> None:
    """PyTorch's product, which a CPU has, too, and the emulation; forward, input's and weight's gradient."""
    if products.recipe == "rowwise" and torch.__version__ < (2, 13):
        pytest.skip("on a CPU PyTorch 2.11 has one scale for a matrix alone")
    x, weight, dy = (random(*shape, seed=i).bfloat16() for i, shape in enumerate([(32, D), (F, D), (32, F)]))
    (x_features, x_rows), (dy_features, dy_rows) = (
        products.cast(x, FEATURES, ROWS),
        products.cast(dy, FEATURES, ROWS, gradient=True),
    )
    (w_features,), (w_rows,) = products.cast(weight, FEATURES), products.cast(weight, ROWS)
    bias = random(F, seed=9).bfloat16()
    for a, b, added in (
        (x_features.matrix, w_features.matrix, bias),
        (dy_features.matrix, w_rows.transposed, None),
        (dy_rows.transposed, x_rows.transposed, None),
    ):
        given = a, b, torch.bfloat16, added
        torch.testing.assert_close(fp8.scaled_mm(*given), fp8.emulated(*given), rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("products", FP8S, ids=str)
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_linear_layer(kind: type, products: Fp8) -> None:
    layer = kind(D, F, factory=Factory(dtype=torch.float64), products=products)
    x, dy = random(S, B, D).requires_grad_(), random(S, B, F, seed=1)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    y = layer(x)
    y.backward(dy)

    def cast(given: Tensor, dim: int, dtype: torch.dtype = E4M3) -> Tensor:
        return rounded(given.detach(), dtype, over(products.recipe, dim, given)).reshape(-1, given.shape[-1])

    gradients, weight = products.gradient_dtype, layer.weight
    want = {
        "y": (cast(x, FEATURES) @ cast(weight, FEATURES).t()).view(S, B, F) + layer.bias,
        "dx": (cast(dy, FEATURES, gradients) @ cast(weight, ROWS)).view(S, B, D),
        "dw": cast(dy, ROWS, gradients).t() @ cast(x, ROWS),
        "db": dy.sum((0, 1)),
    }
    for name, got in {"y": y, "dx": x.grad, "dw": weight.grad, "db": layer.bias.grad}.items():
        torch.testing.assert_close(
            got, want[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
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
    y = ColumnParallelLinear(D, F, products=Fp8("rowwise"))(x)
    assert torch.isnan(y[1, 0]).all() and torch.isfinite(y[2:]).all(), "its own row"


def trained(products: Products, steps: int = 30) -> list[float]:
    """Losses of a small model on the same few samples."""
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=256, swiglu=True, add_bias_linear=False,
        position_embedding_type="rope", normalization="RMSNorm", attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(config, products=lambda number: products, factory=Factory(dtype=torch.bfloat16, seed=1))
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-3)
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
    for recipe in ("tensorwise", "rowwise"):
        assert trained(Fp8(recipe)) == pytest.approx(plain, rel=0.02)
    assert plain[-1] < 0.7 * plain[0]


def test_layers_by_the_ends() -> None:
    ends = Fp8Config(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    assert [fp8.products(ends, n, 6) for n in range(6)] == [PLAIN, *[Fp8("tensorwise", E5M2)] * 3, PLAIN, PLAIN]
    assert fp8.products(Fp8Config(), 0, 6) is PLAIN
    said = fp8.describe(ends, 6, torch.device("cpu"))
    assert "layers 1 to 3" in said and "e5m2 gradients" in said and "emulated on a CPU" in said


def test_gpus_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"capability": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    with pytest.raises(ConfigError, match=r"A100, compute capability 8\.0: fp8 needs 8\.9 or higher"):
        fp8.check_device(torch.device("cuda"))
    facts["capability"] = (9, 0)
    fp8.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    with pytest.raises(ConfigError, match="AMD"):
        fp8.check_device(torch.device("cuda"))
    fp8.check_device(torch.device("cpu"))
