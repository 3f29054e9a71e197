"""Norms and activations against torch's own: values and gradients in fp64, and close in bf16."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasp.config.schema import ModelConfig
from megasp.model.activations import activation
from megasp.model.norm import Norm

DTYPES = [torch.float64, torch.float32]


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, tuple[ModelConfig, Callable[[Tensor], Tensor]]] = {
    "gelu": (ModelConfig(), lambda x: F.gelu(x, approximate="tanh")),
    "swiglu": (ModelConfig(swiglu=True), swiglu),
    "squared relu": (ModelConfig(squared_relu=True), squared_relu),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of a fixed weighting of it."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    y = function(*inputs)
    y.backward(random(*y.shape, seed=9, dtype=y.dtype))
    return [y.detach(), *(x.grad for x in inputs if x.grad is not None)]


def functional(norm: Norm) -> Callable[..., Tensor]:
    names = [name for name, _ in norm.named_parameters()]
    return lambda x, *p: torch.func.functional_call(norm, dict(zip(names, p, strict=True)), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, dtype: torch.dtype) -> None:
    config, reference = ACTIVATIONS[name]
    x = random(3, 2, 8, dtype=dtype)
    torch.testing.assert_close(run(activation(config), x), run(reference, x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(activation(ACTIVATIONS[name][0]), random(2, 6).requires_grad_())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_bf16(name: str) -> None:
    config, reference = ACTIVATIONS[name]
    x = random(64, 64, dtype=torch.bfloat16)
    ours, exact = run(activation(config), x), run(reference, x.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() < 0.02 * b.abs().max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_leaves_its_input(name: str) -> None:
    x = random(2, 4)
    kept = x.clone()
    activation(ACTIVATIONS[name][0])(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_a_strided_input(name: str) -> None:
    config, reference = ACTIVATIONS[name]
    x = random(8, 6)
    torch.testing.assert_close(run(lambda x: activation(config)(x.t()), x), run(lambda x: reference(x.t()), x))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(kind: str, dtype: torch.dtype) -> None:
    x, weight, bias = (
        3 * random(5, 2, 8, dtype=dtype) + 1,
        random(8, seed=1, dtype=dtype),
        random(8, seed=2, dtype=dtype),
    )
    norm = functional(Norm(kind, 8, 1e-3).to(dtype))
    if kind == "RMSNorm":
        ours, theirs = run(norm, x, weight), run(lambda x, w: F.rms_norm(x, (8,), w, 1e-3), x, weight)
    else:
        ours = run(norm, x, weight, bias)
        theirs = run(lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-3), x, weight, bias)
    assert len(ours) == (3 if kind == "RMSNorm" else 4)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_gradcheck(kind: str) -> None:
    parameters = [random(6, seed=i).requires_grad_() for i in range(1 if kind == "RMSNorm" else 2)]
    norm = Norm(kind, 6, 1e-5).double()
    assert torch.autograd.gradcheck(functional(norm), (random(3, 6, seed=5).requires_grad_(), *parameters))


def test_epsilon_is_inside_the_root() -> None:
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    assert torch.allclose(Norm("RMSNorm", 4, 1e-2).double()(x), x / (1e-6 + 1e-2) ** 0.5, rtol=1e-12)


def test_zero_rows_are_finite() -> None:
    for kind in ("RMSNorm", "LayerNorm"):
        y, dx, *_ = run(
            functional(Norm(kind, 4)), torch.zeros(2, 4), torch.ones(4), *[torch.zeros(4)] * (kind[0] == "L")
        )
        assert y.isfinite().all() and dx.isfinite().all(), kind


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_bf16_keeps_wide_statistics(kind: str) -> None:
    """Error of bf16 rounding in and out (2^-8 a value), not of statistics or sums in bf16."""
    n = 512
    x = (random(256, n) * 4 + 30).bfloat16()  # a mean that bf16 statistics would lose the last digits of
    parameters = [(random(n, seed=i) + 1).bfloat16() for i in range(1 if kind == "RMSNorm" else 2)]
    reference = nn.RMSNorm if kind == "RMSNorm" else nn.LayerNorm
    exact = run(
        lambda x, *p: torch.func.functional_call(
            reference(n, eps=1e-5).double(), dict(zip(["weight", "bias"], p, strict=False)), (x,)
        ),
        x.double(),
        *(p.double() for p in parameters),
    )
    ours = run(functional(Norm(kind, n)), x, *parameters)
    errors = {}
    for name, a, b in zip(("y", "dx", "dweight", "dbias")[: len(exact)], ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        errors[name] = ((a.double() - b).norm() / b.norm()).item()
    # One rounding is 2^-9 at most and 0.0017 in the mean; the incoming gradient is rounded the same way.
    assert max(errors.values()) < 0.0028, f"relative errors of {kind} in bf16: {errors}"


def test_weights() -> None:
    norm = Norm("LayerNorm", 4, name="layers.0.input_norm")
    assert norm.bias is not None and norm.weight.tolist() == [1] * 4 and norm.bias.tolist() == [0] * 4
    pieces = [p.pieces[0] for p in norm.parameters()]  # type: ignore[attr-defined]
    assert [p.name for p in pieces] == ["layers.0.input_norm.weight", "layers.0.input_norm.bias"]
    assert not any(p.decay or p.partial for p in pieces)
    assert Norm("RMSNorm", 4).bias is None
