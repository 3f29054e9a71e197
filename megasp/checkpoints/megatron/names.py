"""Where each canonical tensor stands in Megatron-core's: one table for all its GPT models.

ours                     theirs, the first that a checkpoint has
layers.3.attention.q     rows of decoder.layers.3.self_attention.linear_qkv
layers.3.mlp.gate        decoder.layers.3.mlp.linear_fc1 (..._w where it is split), first half
"""

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from megasp.config.schema import ModelConfig

Rows = Callable[[ModelConfig, int], list[range]]
"""Which of a tensor's rows are ours, of the model and of the number of its rows."""


def _all(model: ModelConfig, rows: int) -> list[range]:
    return [range(rows)]


def _first_half(model: ModelConfig, rows: int) -> list[range]:
    return [range(rows // 2)]


def _up(model: ModelConfig, rows: int) -> list[range]:
    """With SwiGLU up stands behind gate."""
    return [range(rows // 2, rows)] if model.swiglu else [range(rows)]


def _of_groups(part: str) -> Rows:
    """q, k or v: for each kv head there stand its query heads, then its key, then its value."""

    def rows(model: ModelConfig, rows: int) -> list[range]:
        each = model.num_attention_heads // model.kv_heads
        heads = {"q": (0, each), "k": (each, each + 1), "v": (each + 1, each + 2)}[part]
        first, last = (head * model.head_dim for head in heads)
        group = (each + 2) * model.head_dim
        return [range(start + first, start + last) for start in range(0, rows, group)]

    return rows


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours may stand.

    Attributes:
        key: there; {n} stands for the layer, {kind} for weight or bias.
        rows: of it that are ours.
    """

    key: str
    rows: Rows = _all

    def name(self, layer: str, kind: str) -> str:
        return self.key.format(n=layer, kind=kind)


_LAYER = "decoder.layers.{n}."
_QKV, _FC1 = _LAYER + "self_attention.linear_qkv.", _LAYER + "mlp.linear_fc1."

PLACES: dict[str, tuple[Place, ...]] = {
    "embedding": (Place("embedding.word_embeddings.{kind}"),),
    "position_embedding": (Place("embedding.position_embeddings.{kind}"),),
    "layers.N.input_norm": (Place(_QKV + "layer_norm_{kind}"), Place(_LAYER + "input_layernorm.{kind}")),
    "layers.N.attention.q": (Place(_QKV + "{kind}", _of_groups("q")),),
    "layers.N.attention.k": (Place(_QKV + "{kind}", _of_groups("k")),),
    "layers.N.attention.v": (Place(_QKV + "{kind}", _of_groups("v")),),
    "layers.N.attention.q_norm": (Place(_LAYER + "self_attention.q_layernorm.{kind}"),),
    "layers.N.attention.k_norm": (Place(_LAYER + "self_attention.k_layernorm.{kind}"),),
    "layers.N.attention.o": (Place(_LAYER + "self_attention.linear_proj.{kind}"),),
    "layers.N.mlp_norm": (Place(_FC1 + "layer_norm_{kind}"), Place(_LAYER + "pre_mlp_layernorm.{kind}")),
    "layers.N.mlp.gate": (Place(_FC1 + "{kind}_w"), Place(_FC1 + "{kind}", _first_half)),
    "layers.N.mlp.up": (Place(_FC1 + "{kind}_v"), Place(_FC1 + "{kind}", _up)),
    "layers.N.mlp.down": (Place(_LAYER + "mlp.linear_fc2.{kind}"),),
    "final_norm": (Place("decoder.final_layernorm.{kind}"),),
    "head": (Place("output_layer.{kind}"),),
}
"""Our module -> where it may stand, by Megatron-core's spec (Transformer Engine's or local) and version."""

GATED = ".mlp.linear_fc1."
"""Of the tensors that hold gate and up with SwiGLU."""
_SPLIT = {
    0: (r"embedding\.word_embeddings\.weight", r"output_layer\.weight", r".*\.linear_(qkv|fc1)\.(weight|bias)"),
    1: (r".*\.linear_(proj|fc2)\.weight",),
}
"""Dim -> the tensors that tensor-parallel ranks split along it."""

IGNORED = ("._extra_state",)
"""Endings of what holds no weights."""


def find(name: str, keys: Container[str]) -> tuple[str, Rows]:
    """The key under which a canonical tensor stands among `keys`, and its rows there; where there is none, the key
    that it would have."""
    module, _, kind = name.rpartition(".")
    number, pattern = re.search(r"\d+", module), re.sub(r"\d+", "N", module)
    places = PLACES[pattern]
    layer = number[0] if number else ""
    found = next((place for place in places if place.name(layer, kind) in keys), places[-1])
    return found.name(layer, kind), found.rows


def unknown(keys: Iterable[str], used: Container[str]) -> list[str]:
    """Those of a model's keys that no canonical tensor stands under."""
    return [key for key in keys if key not in used and not key.endswith(IGNORED)]


def split_dim(key: str) -> int | None:
    """The dim of a tensor that tensor-parallel ranks share out; None where each has all of it."""
    return next((dim for dim, keys in _SPLIT.items() for pattern in keys if re.fullmatch(pattern, key)), None)
