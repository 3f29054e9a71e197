"""FLOPs against the figures that others publish, parameter counts against a model written with torch.nn."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from megasp.config.flags import build
from megasp.config.presets import PRESETS
from megasp.config.schema import ModelConfig
from megasp.model.flops import flops_per_token, mfu, parameter_count, parameter_counts, tflops_per_device
from megasp.training.devices import known_peak, peak_tflops

PUBLISHED = [("llama3-8b", 51.5e9), ("llama3-70b", 449e9), ("llama3.1-405b", 2.52e12)]


@pytest.mark.parametrize(("name", "published"), PUBLISHED)
def test_flops_are_the_published_ones(name: str, published: float) -> None:
    """Causal-half FLOPs per token at 8192 tokens, as NVIDIA's performance pages imply them."""
    assert flops_per_token(build(ModelConfig, PRESETS[name]), 8192) == pytest.approx(published, rel=0.003)


def test_attention_is_half_the_square() -> None:
    model = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, vocab_size=128)
    assert flops_per_token(model, 1000) - flops_per_token(model, 0) == 6 * 3 * 64 * 1000


def reference(model: ModelConfig) -> int:
    """Parameters of the same model as torch.nn counts them."""
    d, bias, qkv_bias = model.hidden_size, model.add_bias_linear, model.add_bias_linear or model.add_qkv_bias

    def norm(size: int) -> nn.Module:
        return nn.LayerNorm(size) if model.normalization == "LayerNorm" else nn.RMSNorm(size)

    modules: list[nn.Module] = [norm(d), nn.Embedding(model.padded_vocab_size, d)]
    if model.untie_embeddings_and_output_weights:
        modules.append(nn.Linear(d, model.padded_vocab_size, bias=False))
    if model.position_embedding_type == "learned_absolute":
        modules.append(nn.Embedding(model.max_position_embeddings or 0, d))
    for _ in range(model.num_layers):
        modules += [norm(d), norm(d)] + [norm(model.head_dim) for _ in range(2 * model.qk_layernorm)]
        for heads in (model.num_attention_heads, model.kv_heads, model.kv_heads):
            modules.append(nn.Linear(d, heads * model.head_dim, bias=qkv_bias))
        modules.append(nn.Linear(model.num_attention_heads * model.head_dim, d, bias=bias))
        modules += [nn.Linear(d, model.mlp_size, bias=bias) for _ in range(1 + model.swiglu)]
        modules.append(nn.Linear(model.mlp_size, d, bias=bias))
    return sum(p.numel() for p in nn.ModuleList(modules).parameters())


def test_counts_of_every_variant() -> None:
    switches = ("swiglu", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights")
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "kv_channels": 10}
    shape |= {"num_query_groups": 2, "vocab_size": 100, "max_position_embeddings": 7}
    for values in itertools.product([False, True], repeat=len(switches)):
        for normalization, positions in (("LayerNorm", "learned_absolute"), ("RMSNorm", "rope")):
            flags: dict[str, Any] = dict(zip(switches, values, strict=True))
            flags |= {"normalization": normalization, "position_embedding_type": positions}
            with torch.device("meta"):
                expected = reference(model := ModelConfig(**shape, **flags))
            assert parameter_count(model) == expected, flags


def test_components() -> None:
    counts = parameter_counts(build(ModelConfig, PRESETS["llama3-8b"]))
    assert counts["embedding"] == counts["output"] == 128256 * 4096
    assert counts["mlp"] == 32 * 3 * 4096 * 14336 and counts["positions"] == 0


def test_speed() -> None:
    assert tflops_per_device(1000, 2e12, 4) == 500
    assert mfu(494.5, 989) == 0.5
    assert mfu(1.0, None) is None


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("NVIDIA GeForce RTX 9999", None, None),
    ],
)
def test_peaks(name: str, bf16: float | None, fp32: float | None) -> None:
    assert (known_peak(name, torch.bfloat16), known_peak(name, torch.float32)) == (bf16, fp32)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None
