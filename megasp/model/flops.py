"""How many parameters a model has, and how many floating-point operations a token costs in training.

The convention is that of model FLOPs: what the mathematics needs, no recompute, a multiply and an add are two
operations, the backward costs twice the forward (PaLM, arXiv 2204.02311 appendix B). Norms, activations, softmax,
biases and the embedding's lookup are left out. Causal attention counts its lower half: a query sees s / 2 keys on
average. Sources that count the full square (PaLM itself; Megatron-LM, arXiv 2104.04473 section 5.1) report more for
the same speed: 12 instead of 6 in the second term of `flops_per_token`.
"""

from megasp.config.schema import ModelConfig


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by component, over all layers; the padding of the vocabulary is counted, a tied head once."""
    d, ffn, head_dim = model.hidden_size, model.mlp_size, model.head_dim
    heads, kv = model.num_attention_heads, model.kv_heads
    fused_ffn = 2 * ffn if model.swiglu else ffn  # gate and up, or up alone
    qkv = (heads + 2 * kv) * head_dim
    attention = d * qkv + heads * head_dim * d + model.qkv_bias * qkv + model.add_bias_linear * d
    mlp = d * fused_ffn + ffn * d + model.add_bias_linear * (fused_ffn + d)
    per_norm = 2 if model.normalization == "LayerNorm" else 1  # weight and bias, or weight alone
    norm_channels = model.num_layers * (2 * d + model.qk_layernorm * 2 * head_dim) + d
    counts = {
        "embedding": model.padded_vocab_size * d,
        "positions": 0,
        "attention": model.num_layers * attention,
        "mlp": model.num_layers * mlp,
        "norms": per_norm * norm_channels,
        "output": model.padded_vocab_size * d if model.untie_embeddings_and_output_weights else 0,
    }
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None, "max_position_embeddings is not known yet"
        counts["positions"] = model.max_position_embeddings * d
    return counts


def parameter_count(model: ModelConfig) -> int:
    """All parameters."""
    return sum(parameter_counts(model).values())


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Operations of forward and backward for one token of a sample of `seq_length` tokens.

        6 x (weights of all matrix products) + 6 x layers x heads x head_dim x seq_length

    Each weight is one multiply-add per token forward (2) and two backward (4). Scores q k^T and mix p v are each
    heads x head_dim multiply-adds per key: 2 x 2 forward and twice that backward, 12 per key; half the keys are seen
    (fewer with a window; documents are not told apart).
    """
    d, width = model.hidden_size, model.num_attention_heads * model.head_dim
    attention_weights = d * (width + 2 * model.kv_heads * model.head_dim) + width * d
    mlp_weights = (3 if model.swiglu else 2) * d * model.mlp_size
    weights = model.num_layers * (attention_weights + mlp_weights) + model.padded_vocab_size * d
    return 6.0 * weights + 12.0 * model.num_layers * width * _keys_per_query(model, seq_length)


def _keys_per_query(model: ModelConfig, seq_length: int) -> float:
    """Keys that a query sees on average: half the sample, or what a window leaves of it (sinks are left out)."""
    if model.window_size is None or model.window_size >= seq_length:
        return seq_length / 2
    return model.window_size * (seq_length - model.window_size / 2) / seq_length


def tflops_per_device(tokens_per_second: float, flops_per_token: float, devices: int) -> float:
    """TFLOP/s of each of `devices` that together train `tokens_per_second`."""
    return tokens_per_second * flops_per_token / devices / 1e12


def mfu(tflops_per_device: float, peak_tflops: float | None) -> float | None:
    """Model FLOPs utilization: the share of the device's peak that is reached; None where the peak is not known."""
    return tflops_per_device / peak_tflops if peak_tflops else None
