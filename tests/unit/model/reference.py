"""A GPT by the textbook on canonical tensors: no fusing, no parallelism, torch.nn.functional alone. And the canonical
tensors of a `GPTModel`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.model import GPTModel
from megasp.parameters import placed

Canonical = dict[str, Tensor]


def weights(model: GPTModel) -> Canonical:
    """Name -> values, of a model that holds every tensor whole."""
    return {
        piece.name: p.detach()[box.slices]
        for p in model.parameters()
        for piece, box in placed(p.pieces)  # type: ignore[attr-defined]
    }


def gradients(model: GPTModel) -> Canonical:
    found = {}
    for p in model.parameters():
        for piece, box in placed(p.pieces):  # type: ignore[attr-defined]
            assert p.grad is not None, piece.name
            found[piece.name] = p.grad[box.slices]
    return found


def randomize(model: GPTModel, std: float = 0.3) -> GPTModel:
    """Norm weights and biases, too, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return model


def batch(config: ModelConfig, samples: int = 2, length: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, mask."""
    generator = torch.Generator().manual_seed(1)
    assert config.vocab_size is not None
    tokens, labels = torch.randint(config.vocab_size, (2, samples, length), generator=generator)
    return tokens, labels, (torch.rand(samples, length, generator=generator) > 0.3).float()


def logits(config: ModelConfig, w: Canonical, tokens: Tensor) -> Tensor:
    """[B, S] -> [B, S, V]."""
    x = w["embedding.weight"][tokens]
    if config.position_embedding_type == "learned_absolute":
        x = x + w["position_embedding.weight"][: tokens.shape[1]]
    for number in range(config.num_layers):
        part = {k.removeprefix(f"layers.{number}."): v for k, v in w.items() if k.startswith(f"layers.{number}.")}
        x = x + _attention(config, part, _norm(config, part, "input_norm", x))
        x = x + _mlp(config, part, _norm(config, part, "mlp_norm", x))
    head = w["head.weight"] if config.untie_embeddings_and_output_weights else w["embedding.weight"]
    return _norm(config, w, "final_norm", x) @ head.t()


def loss(config: ModelConfig, w: Canonical, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Masked sum of the token losses."""
    losses = F.cross_entropy(logits(config, w, tokens).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


def _norm(config: ModelConfig, w: Canonical, name: str, x: Tensor) -> Tensor:
    weight, size = w[f"{name}.weight"], x.shape[-1:]
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, size, weight, config.norm_epsilon)
    return F.layer_norm(x, size, weight, w[f"{name}.bias"], config.norm_epsilon)


def _linear(w: Canonical, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _mlp(config: ModelConfig, w: Canonical, x: Tensor) -> Tensor:
    up = _linear(w, "mlp.up", x)
    if config.swiglu:
        up = F.silu(_linear(w, "mlp.gate", x)) * up
    else:
        up = F.relu(up).square() if config.squared_relu else F.gelu(up, approximate="tanh")
    return _linear(w, "mlp.down", up)


def _attention(config: ModelConfig, w: Canonical, x: Tensor) -> Tensor:
    q, k, v = (_linear(w, f"attention.{n}", x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for n in "qkv")
    if config.qk_layernorm:
        q, k = _norm(config, w, "attention.q_norm", q), _norm(config, w, "attention.k_norm", k)
    if config.position_embedding_type == "rope":
        q, k = _rope(config, q), _rope(config, k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _linear(w, "attention.o", out.transpose(1, 2).flatten(2))


def _rope(config: ModelConfig, x: Tensor) -> Tensor:
    channels = int(config.head_dim * config.rotary_percent) // 2 * 2
    angles = torch.arange(x.shape[-2])[:, None] * config.rotary_base ** (
        -torch.arange(0, channels, 2).double() / channels
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    z = torch.complex(x[..., : channels // 2].double(), x[..., channels // 2 : channels].double()) * turn
    return torch.cat((z.real.to(x), z.imag.to(x), x[..., channels:]), -1)


def small(**values: Any) -> ModelConfig:
    """Two layers of a model with four heads of four."""
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 40}
    shape |= {"make_vocab_size_divisible_by": 8, "max_position_embeddings": 12, "ffn_hidden_size": 24}
    return ModelConfig(**(shape | {"attention_dropout": 0.0, "hidden_dropout": 0.0} | values))


LLAMA: dict[str, Any] = {"num_query_groups": 2, "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False,
                         "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True}  # fmt: skip
