"""`--model NAME`: the published shapes of models, as values of megasp's flags. A flag that is given wins."""

from typing import Any

_LLAMA3: dict[str, Any] = {
    "group_query_attention": True,
    "num_query_groups": 8,
    "position_embedding_type": "rope",
    "rotary_base": 500000.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "seq_length": 8192,
}
"""What the Llama 3 models share (arXiv 2407.21783, table 3)."""

PRESETS: dict[str, dict[str, Any]] = {
    # Llama in small, for a laptop; its vocabulary is the tokenizer's.
    "tiny": {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 256,
        "seq_length": 256,
    },
    # GPT-2's smallest model, with its dropout (https://huggingface.co/openai-community/gpt2 config.json).
    "gpt2-125m": {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 3072,
        "num_attention_heads": 12,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
        "seq_length": 1024,
    },
    "llama3-8b": _LLAMA3 | {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "llama3-70b": _LLAMA3
    | {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
    # Trained on sequences of 8192 at first; positions are scaled for 131072.
    "llama3.1-405b": _LLAMA3
    | {
        "num_layers": 126,
        "hidden_size": 16384,
        "ffn_hidden_size": 53248,
        "num_attention_heads": 128,
        "max_position_embeddings": 131072,
        "rotary_scaling": "llama3",
        "rotary_scaling_factor": 8.0,
        "original_max_position_embeddings": 8192,
    },
}
"""name -> field of `ModelConfig` or `TrainingConfig` -> value."""
