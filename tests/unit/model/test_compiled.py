"""Bodies of which torch.compile made kernels, against the same bodies in PyTorch's operations: values, gradients, what
is kept, how often they are compiled, and what they allocate. A kernel takes some seconds, so a few are tried here, and
all in every dtype with MEGASP_FULL_MATRIX=1 (fp64 by the parity test of a layout, too). Sizes are those of the runs in
tests/resume, so that a process compiles once."""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megasp import doctor
from megasp.config.load import from_values
from megasp.config.schema import ModelConfig
from megasp.config.validate import validate
from megasp.errors import ConfigError
from megasp.model import compiled as compiler
from megasp.model.activations import activation
from megasp.model.compiled import COMPILER, compiled
from megasp.model.dropout import TokenKeys, dropout
from megasp.model.elementwise import Run, eager
from megasp.model.layers import ONE_RANK
from megasp.model.loss import linear_cross_entropy
from megasp.model.norm import Norm
from megasp.model.norm_kernels import NORMS
from megasp.model.rotary import cos_sin, rotate_
from megasp.verify import DEFAULTS

needs_compiler = pytest.mark.skipif(
    bool(compiler.missing("cpu")), reason=f"torch.compile needs {compiler.missing('cpu')}"
)
ROPE = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, position_embedding_type="rope")
HALF = replace(ROPE, hidden_size=64, rotary_percent=0.5)
Made = tuple[Tensor, list[Tensor]]


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def activated(config: ModelConfig) -> Callable[..., Made]:
    def made(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
        x = values(s, b, 128, dtype=dtype).requires_grad_()
        return activation(config, run)(x), [x]

    return made


def rotated(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
    """Six of eight heads."""
    x = values(s, b, 64, dtype=dtype).requires_grad_()
    return rotate_(x * 1, 6, 8, cos_sin(torch.arange(s), ROPE, dtype), run), [x]


def partly_rotated(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
    """Half of the channels of all heads."""
    x = values(s, b, 64, dtype=dtype).requires_grad_()
    return rotate_(x * 1, 4, 16, cos_sin(torch.arange(s), HALF, dtype), run), [x]


def dropped(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
    x, keys = values(s, b, 32, dtype=dtype).requires_grad_(), TokenKeys(torch.arange(b) + 77, torch.arange(s) + 1000)
    return dropout(x, 0.3, 1234567891234567, keys, run), [x]


def loss(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
    """In several chunks."""
    hidden, weight = (values(*shape, dtype=dtype).requires_grad_() for shape in ((s, b, 32), (128, 32)))
    labels = torch.arange(s * b).reshape(s, b) * 7 % 128
    size = 4 * 128 * dtype.itemsize
    total = linear_cross_entropy(hidden, weight, labels, (labels % 3 > 0).float(), ONE_RANK, False, size, run)
    return total, [hidden, weight]


def norm(kind: str) -> Callable[..., Made]:
    def made(run: Run, s: int, b: int, dtype: torch.dtype) -> Made:
        module = Norm(kind, 32, kernel=NORMS["unfused" if run is eager else "compiled"]).to(dtype)
        for parameter in module.parameters():
            parameter.data = values(32, dtype=dtype)
        x = values(s, b, 32, dtype=dtype).requires_grad_()
        return module(x), [x, *module.parameters()]

    return made


FUNCTIONS: dict[str, Callable[..., Made]] = {
    "SwiGLU": activated(ModelConfig(swiglu=True)),
    "GELU": activated(ModelConfig()),
    "squared ReLU": activated(ModelConfig(squared_relu=True)),
    "rotary": rotated,
    "partial rotary": partly_rotated,
    "dropout": dropped,
    "loss": loss,
    "RMSNorm": norm("RMSNorm"),
    "LayerNorm": norm("LayerNorm"),
}
TOLERANCES = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 2e-2}
"""Of the largest value. In bf16 operations round after each, a kernel once."""
SOME = [
    ("LayerNorm", torch.float32),
    *((name, torch.bfloat16) for name in ("SwiGLU", "rotary", "dropout", "loss", "RMSNorm")),
]
CASES = list(itertools.product(FUNCTIONS, TOLERANCES)) if os.environ.get("MEGASP_FULL_MATRIX") else SOME


def results(name: str, run: Run, s: int, b: int, dtype: torch.dtype) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """Output and gradients, and shape and dtype of all that was kept."""
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append((tuple(x.shape), x.dtype))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, leaves = FUNCTIONS[name](run, s, b, dtype)
    y.backward(values(*y.shape, dtype=y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)], kept


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernels_compute_what_operations_do(name: str, dtype: torch.dtype) -> None:
    before = COMPILER.compilations.copy()
    for s, b in ((6, 2), (10, 3), (7, 4)):
        (want, want_kept), (got, kept) = (results(name, run, s, b, dtype) for run in (eager, compiled))
        for x, y in zip(want, got, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
            assert (x - y).abs().max() <= TOLERANCES[dtype] * x.abs().max(), (s, b)
        assert kept == want_kept, "what is kept is a Function's, whoever computes"
        if name == "dropout":
            assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True)), "the mask is a function"
    made = COMPILER.compilations - before
    assert len(made) <= 2 and set(made.values()) <= {1}, "forward and backward, once each for all shapes"
    assert COMPILER.compilations, "they are, here or by a test before"


@needs_compiler
def test_a_kernel_allocates_what_it_returns() -> None:
    """As the account says: no memory for what is between, but a number a row."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    made = compiler.Compiler()
    torch._dynamo.reset()
    with (
        config.patch(fx_graph_cache=False),
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        mock.patch.object(compiler, "COMPILER", made),
    ):
        for name, dtype in (("SwiGLU", torch.bfloat16), ("rotary", torch.bfloat16), ("loss", torch.bfloat16)):
            results(name, compiled, 6, 2, dtype)
    sizes = [re.findall(r"= empty_strided_cpu\((\(.*?\)),", code) for code in codes]
    assert [len(each) for each in sizes] == [1, 1, 1, 1, 2, 0], "y; dx; y; dx; two sums a row; the gradient in place"
    assert all(", 1)" in size for size in sizes[4])


@pytest.mark.parametrize(
    ("change", "found"),
    [({"CXX": "no-such-compiler"}, "a C++ compiler (no-such-compiler)"), ({"PATH": ""}, "C++ compiler (g++)")],
)
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], found: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        compiler.check.__wrapped__("cpu")
    assert raised.value.got == "--compile" and found in raised.value.rule
    assert "leave --compile out" in raised.value.fix
    (line,) = (finding.found for finding in doctor.other_kernels() if finding.name == "--compile, cpu")
    assert line.startswith("no: it needs a C++ compiler")


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compiler.missing("cuda") == "the package triton"


@needs_compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CppCompileError: C++ compile error\n\nx.cpp:2:10: fatal error: Python.h: No such file")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ConfigError, match=r"fatal error: Python\.h"):
        compiler.check.__wrapped__("cpu")


def test_compile_goes_with_the_named_norms() -> None:
    """The norms' own flag is the last word on them."""
    for values in ({}, {"bf16": True}, {"norm_backend": "fused", "bf16": True}):
        config = from_values(DEFAULTS | {"compile": True} | values)
        validate(config, 1, "cuda")
        assert config.kernels.norm("cuda", config.training.compute_dtype)[0] == values.get("norm_backend", "compiled")
