"""Small random models of each family, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gpt2": ("GPT2", {}),
}
"""Name -> transformers' prefix, settings."""


def make(name: str, directory: Path, dtype: torch.dtype = torch.float32, cached: bool = False, **settings: Any) -> Any:
    """Save a random model, and return it."""
    import transformers

    prefix, own = FAMILIES[name]
    values = SHAPE | own | settings
    if prefix == "GPT2":
        values = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 64,
            "n_positions": 64,
            "initializer_range": 0.3,
        }
        values |= {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{prefix}Config")(**values, attn_implementation="eager")
    suffix = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # norms and biases: none may be left out unnoticed
    model.save_pretrained(directory)
    return model


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
