"""The whole model against transformers, same weights: logits, loss, and the gradient of every tensor by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasp.config.schema import ModelConfig
from megasp.model import Factory, GPTModel
from tests.unit.model.reference import LLAMA, Canonical, batch, gradients, randomize, small, weights

transformers = pytest.importorskip("transformers")

LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "final_norm": "model.norm",
    "layers.": "model.layers.", "input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.": "self_attn.",
} | {f".{p}.weight": f".{p}_proj.weight" for p in ("q", "k", "v", "o", "gate", "up", "down")}  # fmt: skip
"""Part of a canonical name -> of transformers'."""


def llama(config: ModelConfig) -> nn.Module:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rotary_scaling == "llama3":
        rope |= {"rope_type": "llama3", "factor": config.rotary_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.padded_vocab_size,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters=rope,
            max_position_embeddings=131072,
            tie_word_embeddings=not config.untie_embeddings_and_output_weights,
            attn_implementation="eager",
        )
    ).double()


def llama_state(tensors: Canonical, tied: bool) -> Canonical:
    """Canonical tensors by transformers' names."""
    state = {}
    for name, tensor in tensors.items():
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def gpt2(config: ModelConfig) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=config.hidden_size,
            n_inner=config.mlp_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            vocab_size=config.padded_vocab_size,
            layer_norm_epsilon=config.norm_epsilon,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            attn_implementation="eager",
        )
    ).double()


def gpt2_state(tensors: Canonical, layers: int) -> Canonical:
    """Canonical tensors by transformers' names; its matrices are [in, out], q, k and v side by side."""
    state = {
        "transformer.wte.weight": tensors["embedding.weight"],
        "lm_head.weight": tensors["embedding.weight"],
        "transformer.wpe.weight": tensors["position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = tensors[f"final_norm.{kind}"]
        for n in range(layers):
            there, here = f"transformer.h.{n}", f"layers.{n}"
            state[f"{there}.ln_1.{kind}"] = tensors[f"{here}.input_norm.{kind}"]
            state[f"{there}.ln_2.{kind}"] = tensors[f"{here}.mlp_norm.{kind}"]
            state[f"{there}.attn.c_attn.{kind}"] = torch.cat(
                [tensors[f"{here}.attention.{p}.{kind}"] for p in "qkv"]
            ).t()
            for theirs, ours in (("attn.c_proj", "attention.o"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")):
                state[f"{there}.{theirs}.{kind}"] = tensors[f"{here}.{ours}.{kind}"].t()
    return state


def summed(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()


def compare(config: ModelConfig, theirs: nn.Module, rename: Any, tolerance: float) -> None:
    ours = randomize(GPTModel(config, factory=Factory(dtype=torch.float64)))
    theirs.load_state_dict(rename(weights(ours)), strict=True)
    tokens, labels, mask = batch(config)
    expected = theirs.eval()(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=tolerance, atol=tolerance)
    loss, expected_loss = ours(tokens, labels, mask), summed(expected, labels, mask)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    loss.backward()
    expected_loss.backward()
    named = rename(gradients(ours))
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        error = (named[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"untie_embeddings_and_output_weights": False},
    "multi-head": {"num_query_groups": None},
    "multi-query": {"num_query_groups": 1},
    "wide heads": {"kv_channels": 8},
    "llama3 scaling": {"rotary_scaling": "llama3", "rotary_base": 5e5, "kv_channels": 16},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_llama(name: str) -> None:
    """transformers computes its rotary tables and norms in fp32 whatever the dtype."""
    config = small(**LLAMA | VARIANTS[name])
    compare(config, llama(config), lambda t: llama_state(t, not config.untie_embeddings_and_output_weights), 1e-5)


def test_gpt2() -> None:
    """Learned positions, LayerNorm, biases, GELU, tied: equal to the last digits of fp64."""
    config = small()
    compare(config, gpt2(config), lambda t: gpt2_state(t, config.num_layers), 1e-10)
