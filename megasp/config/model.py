"""What a model is made of: the part of the configuration that defines its function, as flags."""

from dataclasses import dataclass

from megasp.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model.

    Example: `ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=1000)`.
    """

    num_layers: int = flag(0, "transformer layers (required, or by --model)")
    hidden_size: int = flag(0, "width of the residual stream (required, or by --model)")
    ffn_hidden_size: int | None = flag(
        None, "width of the MLP; 4 x hidden-size, or two thirds of that rounded down to a multiple of 64 with --swiglu"
    )
    num_attention_heads: int = flag(0, "query heads (required, or by --model)")
    group_query_attention: bool = flag(False, "share each key and value head among several query heads")
    num_query_groups: int | None = flag(None, "key and value heads (with --group-query-attention); 1 is multi-query")
    kv_channels: int | None = flag(None, "size of a head; hidden-size / num-attention-heads without it")
    max_position_embeddings: int | None = flag(None, "longest sequence the model is made for; seq-length without it")
    position_embedding_type: str = flag(
        "learned_absolute", "how positions enter", choices=("learned_absolute", "rope", "none")
    )
    rotary_base: float = flag(10000.0, "base of the rotary frequencies")
    rotary_percent: float = flag(1.0, "share of a head's channels that rotate")
    rotary_scaling: str | None = flag(
        None,
        "how rotary frequencies are scaled to a longer context than the model was trained with",
        choices=("linear", "ntk", "yarn", "llama3"),
    )
    rotary_scaling_factor: float | None = flag(None, "new context / trained context; for llama3 8 without it")
    original_max_position_embeddings: int | None = flag(
        None, "the context that the model was trained with, for --rotary-scaling yarn, and llama3 (8192 without it)"
    )
    normalization: str = flag("LayerNorm", "kind of norm", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = flag(1e-5, "added to the variance in norms")
    swiglu: bool = flag(False, "gated MLP with SiLU")
    squared_relu: bool = flag(False, "squared ReLU in the MLP instead of GELU")
    add_bias_linear: bool = flag(True, "biases in linear layers", off="--disable-bias-linear")
    add_qkv_bias: bool = flag(False, "biases in the query, key and value projections alone")
    qk_layernorm: bool = flag(False, "norm of queries and keys per head")
    untie_embeddings_and_output_weights: bool = flag(
        False, "an output head of its own instead of the embedding's weights"
    )
    attention_dropout: float = flag(0.1, "dropout of attention probabilities (unfused attention only)")
    hidden_dropout: float = flag(0.1, "dropout of embeddings and residual branches")
    window_size: int | None = flag(None, "tokens before itself that a token sees; all of its sample without it")
    attention_sinks: int = flag(0, "first tokens that every token sees beyond --window-size")
    init_method_std: float = flag(0.02, "standard deviation of initial weights")
    vocab_size: int | None = flag(None, "token ids before padding; the tokenizer's, where one is given")
    make_vocab_size_divisible_by: int = flag(
        128, "the vocabulary is padded to a multiple of it (in every layout alike, unlike Megatron-LM's)"
    )

    @property
    def kv_heads(self) -> int:
        """Key and value heads; --group-query-attention alone means one, as in Megatron-LM."""
        return self.num_query_groups or (1 if self.group_query_attention else self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer (of each of gate and up, with SwiGLU)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary padded to `make_vocab_size_divisible_by`."""
        assert self.vocab_size is not None, "vocab_size is not known yet"
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def rotary_factor(self) -> float:
        """Factor of `rotary_scaling`; Llama 3.1's where none is given."""
        return self.rotary_scaling_factor or (8.0 if self.rotary_scaling == "llama3" else 1.0)

    @property
    def rotary_original_context(self) -> int:
        """Positions that the model was trained with before its frequencies were scaled; Llama 3's without another."""
        return self.original_max_position_embeddings or 8192

    @property
    def ntk_base(self) -> float:
        """The base of the rotary frequencies that `rotary_scaling` "ntk" means."""
        channels = int(self.head_dim * self.rotary_percent) // 2 * 2
        return float(self.rotary_base * self.rotary_factor ** (channels / (channels - 2)))

    @property
    def qkv_bias(self) -> bool:
        return self.add_bias_linear or self.add_qkv_bias
