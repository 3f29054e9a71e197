"""Hugging Face's model families that megasp reads and writes: one table each. Adding a family is adding a table.

A table says how modules are called there, which of ours are fused in one of theirs, which settings stand under which
keys of config.json, and what all models of the family have in common. Everything that converts reads these tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Setting:
    """One setting under both names.

    Attributes:
        ours: attribute of `ModelConfig` that config.json's `key` is written from.
        key: of config.json.
        absent: its value where the key is missing, as transformers has it; `REQUIRED` for none.
        sets: fields of `ModelConfig` that reading sets; `ours` without it.
        read, write: their value as ours, and back.
    """

    ours: str
    key: str
    absent: Any = REQUIRED
    sets: tuple[str, ...] = ()
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


@dataclass(frozen=True)
class Family:
    """One of Hugging Face's architectures.

    Attributes:
        model_type, architecture: as config.json names them.
        prefix: of all tensors but the head's; files saved from the bare model leave it out.
        names: our module -> theirs; N stands for a layer's number; `.weight` and `.bias` stay as they are.
        fused: their module -> ours that stand in it one after the other, by output channel.
        transposed: their modules whose weights are [in, out].
        settings: of config.json.
        always: field of `ModelConfig` -> what every model of the family has.
        served: key of config.json -> the values that megasp can compute; a missing key is one of them.
        constant: what else config.json must say.
        rotary: whether positions are rotary.
        ignored: endings of tensors that hold no weights.
    """

    model_type: str
    architecture: str
    prefix: str
    names: Mapping[str, str]
    settings: tuple[Setting, ...]
    always: Mapping[str, Any]
    served: Mapping[str, tuple[Any, ...]]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    constant: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = True
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)


_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "layers.N.input_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.q": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.k": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.v": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.o": "model.layers.N.self_attn.o_proj",
    "layers.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.mlp.gate": "model.layers.N.mlp.gate_proj",
    "layers.N.mlp.up": "model.layers.N.mlp.up_proj",
    "layers.N.mlp.down": "model.layers.N.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

_TIED = Setting(
    "untie_embeddings_and_output_weights",
    "tie_word_embeddings",
    False,
    read=lambda tied: not tied,
    write=lambda untied: not untied,
)
_LLAMA_SETTINGS = (
    Setting("num_layers", "num_hidden_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("mlp_size", "intermediate_size", sets=("ffn_hidden_size",)),
    Setting("num_attention_heads", "num_attention_heads"),
    Setting("kv_heads", "num_key_value_heads", None, sets=("num_query_groups",)),
    Setting("head_dim", "head_dim", None, sets=("kv_channels",)),
    Setting("padded_vocab_size", "vocab_size", sets=("vocab_size",)),
    Setting("norm_epsilon", "rms_norm_eps", 1e-6),
    Setting("init_method_std", "initializer_range", 0.02),
    Setting("attention_dropout", "attention_dropout", 0.0),
)
_LLAMA_ALWAYS = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
}
_LLAMA_SERVED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "pretraining_tp": (1,)}
_FULL_ATTENTION: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,), "layer_types": ("full_attention",)}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    names=_LLAMA_NAMES,
    settings=(
        *_LLAMA_SETTINGS,
        _TIED,
        Setting("add_bias_linear", "attention_bias", False),
        Setting("add_bias_linear", "mlp_bias", False),
        Setting("max_position_embeddings", "max_position_embeddings", 2048),
    ),
    always={name: value for name, value in _LLAMA_ALWAYS.items() if name != "add_bias_linear"},
    served=_LLAMA_SERVED,
    constant={"hidden_act": "silu"},
)
"""Llama 2, 3, 3.1, 3.2, and what others published in its shape."""

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    names=_LLAMA_NAMES,
    settings=(
        *_LLAMA_SETTINGS,
        _TIED,
        # There a window counts the token itself.
        Setting(
            "window_size",
            "sliding_window",
            4096,
            read=lambda tokens: None if tokens is None else tokens - 1,
            write=lambda before: None if before is None else before + 1,
        ),
        Setting("max_position_embeddings", "max_position_embeddings", 131072),
    ),
    always=_LLAMA_ALWAYS,
    served=_LLAMA_SERVED,
    constant={"hidden_act": "silu"},
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    names=_LLAMA_NAMES,
    settings=(*_LLAMA_SETTINGS, _TIED, Setting("max_position_embeddings", "max_position_embeddings", 32768)),
    always=_LLAMA_ALWAYS | {"add_qkv_bias": True},
    served=_LLAMA_SERVED | _FULL_ATTENTION,
    constant={"hidden_act": "silu", "use_sliding_window": False},
)
"""Qwen2 and Qwen2.5."""

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    names=_LLAMA_NAMES
    | {
        "layers.N.attention.q_norm": "model.layers.N.self_attn.q_norm",
        "layers.N.attention.k_norm": "model.layers.N.self_attn.k_norm",
    },
    settings=(
        *(setting for setting in _LLAMA_SETTINGS if setting.key != "head_dim"),
        Setting("head_dim", "head_dim", 128, sets=("kv_channels",)),
        _TIED,
        Setting("max_position_embeddings", "max_position_embeddings", 32768),
    ),
    always=_LLAMA_ALWAYS | {"qk_layernorm": True},
    served=_LLAMA_SERVED | _FULL_ATTENTION | {"attention_bias": (False,)},
    constant={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    names={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "layers.N.input_norm": "transformer.h.N.ln_1",
        "layers.N.attention.o": "transformer.h.N.attn.c_proj",
        "layers.N.mlp_norm": "transformer.h.N.ln_2",
        "layers.N.mlp.up": "transformer.h.N.mlp.c_fc",
        "layers.N.mlp.down": "transformer.h.N.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fused={
        "transformer.h.N.attn.c_attn": ("layers.N.attention.q", "layers.N.attention.k", "layers.N.attention.v"),
    },
    transposed=(
        "transformer.h.N.attn.c_attn",
        "transformer.h.N.attn.c_proj",
        "transformer.h.N.mlp.c_fc",
        "transformer.h.N.mlp.c_proj",
    ),
    settings=(
        Setting("num_layers", "n_layer", 12),
        Setting("hidden_size", "n_embd", 768),
        Setting("mlp_size", "n_inner", None, sets=("ffn_hidden_size",)),
        Setting("num_attention_heads", "n_head", 12),
        Setting("padded_vocab_size", "vocab_size", 50257, sets=("vocab_size",)),
        Setting("max_position_embeddings", "n_positions", 1024),
        Setting("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Setting("init_method_std", "initializer_range", 0.02),
        Setting("attention_dropout", "attn_pdrop", 0.1),
        Setting("hidden_dropout", "resid_pdrop", 0.1),
        Setting("hidden_dropout", "embd_pdrop", 0.1),
        Setting(_TIED.ours, _TIED.key, True, read=_TIED.read, write=_TIED.write),
    ),
    always={"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"},
    served={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    constant={"activation_function": "gelu_new"},
    rotary=False,
    ignored=(".attn.bias", ".attn.masked_bias"),
)

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)
"""In the order in which an exported model tries them."""
