"""A tiled MLP is the MLP: values and every gradient, for any number of tiles, also ones that do not divide."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.model import Factory, GPTModel

LLAMA = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, attention_dropout=0.0, hidden_dropout=0.1,
    swiglu=True, normalization="RMSNorm", add_bias_linear=False, untie_embeddings_and_output_weights=True,
)  # fmt: skip
GPT2 = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, attention_dropout=0.0)


def gradients(config: ModelConfig, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    model = GPTModel(dataclasses.replace(config), factory=Factory(dtype=dtype), **options)
    tokens = torch.arange(26).view(2, 13)
    loss = model(tokens, tokens + 1, samples=torch.tensor([3, 4]))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("tiles", [2, 4, 13, 100])
def test_parity(config: ModelConfig, tiles: int) -> None:
    want, got = gradients(config), gradients(config, tiled_mlp=tiles)
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_with_full_recompute() -> None:
    want, got = gradients(LLAMA, tiled_mlp=3), gradients(LLAMA, tiled_mlp=3, recompute=Recompute("full"))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_weight_gradients_are_summed_wide() -> None:
    """In bf16, many tiles are as near to fp64 as one is."""
    exact = gradients(LLAMA)
    one, many = (gradients(LLAMA, torch.bfloat16, tiled_mlp=tiles) for tiles in (1, 13))
    name = "layers.0.mlp.down.weight"
    error = [(held[name].double() - exact[name]).norm() / exact[name].norm() for held in (one, many)]
    assert error[1] < 1.2 * error[0]
