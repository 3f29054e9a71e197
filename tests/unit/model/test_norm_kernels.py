"""Norms by other kernels than the reference's. Those of packages cannot run here: small modules stand in their places,
take what the packages take and nothing else, and compute by exact mathematics in fp64."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.kernels import NORM_KERNELS, NORM_PREFERENCE, KernelConfig, KernelFacts
from megasp.model.norm import Norm
from megasp.model.norm_kernels import NORMS, UNFUSED

D = 16


def exact(kind: str, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dy: Tensor) -> list[Tensor]:
    """y, dx, dweight, dbias by autograd in fp64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    with torch.enable_grad():
        centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
        y = centred * (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight
        y = y + bias if kind == "LayerNorm" else y
        leaves = [x, weight, *([bias] if kind == "LayerNorm" else [])]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def statistics(x: Tensor, epsilon: float, centred: bool) -> list[Tensor]:
    """(mean,) 1 / root of mean square, one a row, fp32, as extensions return them."""
    rows = x.detach().double().flatten(0, -2)
    mean = rows.mean(-1)
    square = (rows - mean[:, None] if centred else rows).square().mean(-1)
    rstd = (square + epsilon).rsqrt().float()
    return [mean.float(), rstd] if centred else [rstd]


class Exact:
    """What the extensions' functions do, whatever the order of their arguments."""

    epsilon = 1e-3

    def forward(self, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> list[Tensor]:
        assert x.is_contiguous() and weight.shape == (D,) and weight.dtype == x.dtype and epsilon == self.epsilon
        bias = torch.zeros_like(weight) if bias is None else bias
        y = exact(kind, x, weight, bias, epsilon, torch.ones_like(x))[0].to(x.dtype)
        return [y, *statistics(x, epsilon, kind == "LayerNorm")]

    def backward(self, kind: str, dy: Tensor, x: Tensor, weight: Tensor, *given: Tensor) -> list[Tensor]:
        assert dy.is_contiguous() and x.is_contiguous() and dy.shape == x.shape and dy.dtype == x.dtype
        for got, want in zip(given, statistics(x, self.epsilon, kind == "LayerNorm"), strict=True):
            assert torch.equal(got, want), "the forward's statistics, in its order"
        return [t.to(x.dtype) for t in exact(kind, x, weight, weight, self.epsilon, dy)[1:]]


def fake_apex(math: Exact) -> dict[str, ModuleType]:
    module: Any = ModuleType("fused_layer_norm_cuda")

    def forward_affine(x, shape, weight, bias, epsilon):  # type: ignore[no-untyped-def]
        assert tuple(shape) == (D,)
        return math.forward("LayerNorm", x, weight, bias, epsilon)

    def backward_affine(dy, mean, invvar, x, shape, weight, bias, epsilon, memory_efficient):  # type: ignore[no-untyped-def]
        assert tuple(shape) == (D,) and bias.shape == (D,) and memory_efficient is False
        return math.backward("LayerNorm", dy, x, weight, mean, invvar)

    def rms_forward_affine(x, shape, weight, epsilon):  # type: ignore[no-untyped-def]
        return math.forward("RMSNorm", x, weight, None, epsilon)

    def rms_backward_affine(dy, invvar, x, shape, weight, epsilon, memory_efficient):  # type: ignore[no-untyped-def]
        assert tuple(shape) == (D,) and memory_efficient is False
        return math.backward("RMSNorm", dy, x, weight, invvar)

    for function in (forward_affine, backward_affine, rms_forward_affine, rms_backward_affine):
        setattr(module, function.__name__, function)
    return {"fused_layer_norm_cuda": module}


def fake_transformer_engine(math: Exact) -> dict[str, ModuleType]:
    module: Any = ModuleType("transformer_engine_torch")
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.constants")
    package: dict[str, Any] = {name: ModuleType(name) for name in names}
    package[names[0]].pytorch, package[names[1]].constants = package[names[1]], package[names[2]]
    package[names[2]].TE_DType = {torch.bfloat16: "kBFloat16", torch.float32: "kFloat32"}

    def check(x, out, quantizer, dtype, margin, zero_centered):  # type: ignore[no-untyped-def]
        assert x.dim() == 2 and out is None and quantizer is None and margin == 0 and zero_centered is False
        assert dtype == package[names[2]].TE_DType[x.dtype]

    def rmsnorm_fwd(x, weight, epsilon, out, quantizer, dtype, margin, zero_centered):  # type: ignore[no-untyped-def]
        check(x, out, quantizer, dtype, margin, zero_centered)
        y, rstd = math.forward("RMSNorm", x, weight, None, epsilon)
        return y, None, rstd

    def rmsnorm_bwd(dy, x, rstd, weight, margin, zero_centered):  # type: ignore[no-untyped-def]
        assert x.dim() == 2 and margin == 0 and zero_centered is False
        return math.backward("RMSNorm", dy, x, weight, rstd)

    def layernorm_fwd(x, weight, bias, epsilon, out, quantizer, dtype, margin, zero_centered):  # type: ignore[no-untyped-def]
        check(x, out, quantizer, dtype, margin, zero_centered)
        return math.forward("LayerNorm", x, weight, bias, epsilon)

    def layernorm_bwd(dy, x, mean, rstd, weight, margin, zero_centered):  # type: ignore[no-untyped-def]
        assert x.dim() == 2 and margin == 0 and zero_centered is False
        return math.backward("LayerNorm", dy, x, weight, mean, rstd)

    for function in (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd):
        setattr(module, function.__name__, function)
    return {"transformer_engine_torch": module, **package}


def results(norm: Norm, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y, *torch.autograd.grad(y, [x, *norm.parameters()], dy)]


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "fake"), [("apex", fake_apex), ("transformer-engine", fake_transformer_engine)])
def test_packages(kind: str, dtype: torch.dtype, name: str, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module_name, module in fake(Exact()).items():
        monkeypatch.setitem(sys.modules, module_name, module)
    ours, theirs = (Norm(kind, D, Exact.epsilon, kernel=kernel).to(dtype) for kernel in (UNFUSED, NORMS[name]))
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(D, 4, 3, generator=generator).to(dtype).transpose(0, 2) for _ in range(2))
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn(D, generator=generator)))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(results(theirs, x, dy), results(ours, x, dy), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_pytorchs_layer_norm() -> None:
    """Its fused RMSNorm has no backward on a CPU; LayerNorm runs in fp32."""
    ours, fused = (Norm("LayerNorm", D, kernel=kernel) for kernel in (UNFUSED, NORMS["fused"]))
    x, dy = (torch.randn(5, 2, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for got, want in zip(results(fused, x, dy), results(ours, x, dy), strict=True):
        torch.testing.assert_close(got, want)
    y, rstd = NORMS["fused"].rms(x, ours.weight.detach(), 1e-5)
    want_y, want_rstd = UNFUSED.rms(x, ours.weight.detach(), 1e-5)
    torch.testing.assert_close((y, rstd), (want_y, want_rstd))


def test_table_registry_and_flag_agree() -> None:
    assert set(NORM_KERNELS) == set(NORMS)
    everywhere = {name for name, facts in NORM_KERNELS.items() if not facts.module}
    assert {*NORM_PREFERENCE, "compiled"} == everywhere, "compiled is for who asked for a compiler"
    assert KernelConfig(compile=True).norm("cuda", "bfloat16") == ("compiled", "")
    assert KernelConfig(compile=True, norm_backend="fused").norm("cuda", "bfloat16") == ("fused", "")
    assert KernelConfig().norm("cpu", "bfloat16") == ("unfused", "")
    assert KernelConfig().norm("cuda", "bfloat16") == ("fused", "")
    assert KernelConfig().norm("cuda", "float64") == ("unfused", "")
    name, reason = KernelConfig(norm_backend="apex").norm("cpu", "float32")
    assert name is None and reason == "apex: it runs on cuda, not on cpu"


def test_the_log_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages are never picked by themselves: what is installed is told, and which flag takes it."""
    assert KernelConfig().described("fused", "torch", "cuda").startswith("norms fused (auto: PyTorch's own), optimizer")
    monkeypatch.setattr(KernelFacts, "installed", property(lambda facts: facts.module == "amp_C"))
    assert KernelConfig().chosen("cuda", "bfloat16") == ("fused", "torch")
    said = KernelConfig(norm_backend="apex").described("apex", "torch", "cuda")
    assert said == (
        "norms apex (--norm-backend), optimizer torch (auto: PyTorch's own; apex, installed, where --optimizer-backend "
        "names it)"
    )
    assert "apex" not in KernelConfig().described("unfused", "torch", "cpu"), "which has no kernels of it"
