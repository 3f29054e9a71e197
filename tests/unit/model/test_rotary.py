"""Rotary embedding: the half-split convention against complex numbers, Llama 3.1's scaling against transformers'."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.model.rotary import cos_sin, frequencies, rotate_


def config(head_dim: int, **values: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=1, hidden_size=head_dim, num_attention_heads=1, position_embedding_type="rope", **values
    )


def rotated(x: Tensor, positions: Tensor, channels: int, base: float = 10000.0) -> Tensor:
    """Channels i and i + channels / 2 as a complex number, turned by position x base^(-2i / channels)."""
    half = channels // 2
    turn = positions.double()[:, None] * base ** (-torch.arange(half, dtype=torch.float64) * 2 / channels)
    z = torch.complex(x[..., :half], x[..., half:channels]) * torch.polar(torch.ones_like(turn), turn)[:, None, None]
    return torch.cat((z.real, z.imag, x[..., channels:]), -1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("percent", "channels"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.9, 6)])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation(percent: float, channels: int, heads: int) -> None:
    """The first `heads` of four heads; the channels beyond `percent` and the other heads pass unchanged."""
    model = config(8, rotary_percent=percent, rotary_base=500.0)
    positions, x = torch.tensor([0, 3, 1000, 5]), random(4, 2, 4, 8)
    expected = x.clone()
    expected[:, :, :heads] = rotated(x[:, :, :heads], positions, channels, 500.0)
    got = rotate_(x.flatten(2).clone(), heads, 8, cos_sin(positions, model, torch.float64))
    torch.testing.assert_close(got.view_as(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.view_as(x)[0], x[0]), "position 0 does not turn"


def test_works_in_place() -> None:
    x = random(3, 1, 16)
    assert rotate_(x, 2, 8, cos_sin(torch.arange(3), config(8), torch.float64)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_gradients(percent: float) -> None:
    table = cos_sin(torch.tensor([7, 1, 30]), config(8, rotary_percent=percent), torch.float64)
    x = random(3, 2, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate_(x.clone(), 2, 8, table), (x,))


def test_scores_depend_on_distance_alone() -> None:
    q, k = random(2, 1, 1, 8)[:1], random(2, 1, 1, 8)[1:]

    def score(i: int, j: int) -> Tensor:
        turned = [
            rotate_(x.flatten(2).clone(), 1, 8, cos_sin(torch.tensor([at]), config(8), torch.float64))
            for x, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(17, 5), score(100_012, 100_000), rtol=1e-9, atol=0)


def test_far_positions_are_exact() -> None:
    """Angles in fp64: fp32 would be off by tens of degrees at 10^9, where 0.1 must still be right."""
    position = 10**9
    cos, sin = cos_sin(torch.tensor([position]), config(8), torch.float32)
    angle = torch.tensor(float(position), dtype=torch.float64)
    assert abs(cos[0, 0, 0, 0] - angle.cos()) < 1e-6 and abs(sin[0, 0, 0, 0] - angle.sin()) < 1e-6
    assert cos.dtype == torch.float32 and cos.shape == (1, 1, 1, 4)


@pytest.mark.parametrize("base", [10000.0, 1e6])
@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
def test_scaling_against_transformers(kind: str, base: float) -> None:
    """NTK-aware scaling is transformers' dynamic one at a sequence of `factor` times the trained length."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, context = 16.0, 4096
    original = context if kind == "yarn" else None
    scaling = {"rotary_scaling": kind, "rotary_scaling_factor": factor, "original_max_position_embeddings": original}
    model = config(64, rotary_base=base, **scaling)
    theirs = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=context if kind == "ntk" else int(factor * context),
        rope_parameters={
            "rope_type": "dynamic" if kind == "ntk" else kind, "rope_theta": base,
            "factor": 1.0 if kind == "ntk" else factor, "original_max_position_embeddings": context,
        },
    )  # fmt: skip
    name = "dynamic" if kind == "ntk" else kind
    inverse, scale = ROPE_INIT_FUNCTIONS[name](theirs, "cpu", seq_len=int(factor * context) if kind == "ntk" else None)
    torch.testing.assert_close(frequencies(model).float(), inverse, rtol=1e-5, atol=0)
    cos, sin = cos_sin(torch.tensor([0]), model, torch.float64)
    assert cos[0, 0, 0].tolist() == pytest.approx([scale] * 32) and not sin.any()
    if kind == "yarn":
        assert scale > 1.2
    else:
        assert scale == 1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_against_transformers(factor: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = config(128, rotary_base=500000.0, rotary_scaling="llama3", rotary_scaling_factor=factor)
    theirs = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    inverse, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    assert scale == 1.0
    torch.testing.assert_close(frequencies(model).float(), inverse, rtol=1e-5, atol=0)
    plain = frequencies(config(128, rotary_base=500000.0))
    ratio = frequencies(model) / plain
    assert ratio[0] == 1 and ratio[-1] == 1 / factor and ((ratio < 1) & (ratio > 1 / factor)).any(), "three regimes"
