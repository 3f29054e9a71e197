"""Which models can be served, and one sentence for each that cannot: nothing that a model does is left out unsaid."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megasp.config.kernels import ALIASES, ATTENTION_KERNELS
from megasp.errors import ConfigError
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import kernels

KERNELS = {"flash_attention_2": "flash-attn-2", "flash_attention_3": "flash-attn-3", "sdpa": "auto", "eager": "unfused"}
"""transformers' names of attention implementations -> ours."""

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that mix tokens by nothing but attention that is split here."""

MIXERS = re.compile(r"Mamba|DeltaNet|LinearAttention|Lightning|Recurrent|RgLru|Rwkv|ShortConv|SSM|XLSTM", re.IGNORECASE)
"""Names of modules that mix tokens by other means."""

LOCAL_ROPE = {"dynamic", "longrope"}
"""Kinds of rotary embedding whose angles depend on the longest position that a rank sees."""


def check_model(model: object, state: ParallelState) -> None:
    """Whether this model's sequences can be split over these ranks.

    Raises:
        ConfigError: they cannot.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"a {type(model).__name__}", "it must be a transformers model", "load it with transformers")
    for got, rule, fix in _obstacles(model, state):
        raise ConfigError(f"{type(model).__name__}{got}", rule, fix)


def _obstacles(model: PreTrainedModel, state: ParallelState) -> Iterator[tuple[str, str, str]]:
    """(got, rule, fix) of everything in the way."""
    config = model.config.get_text_config()
    other = "train another model, or this one without sequence parallelism"
    if state.tp.size > 1 or state.pp.size > 1:
        yield (
            f" on layout {state.layout.name}",
            "transformers models are split by sequence and data alone",
            "use tp and pp 1",
        )
    if model.config.is_encoder_decoder or model.config.sub_configs:
        yield "", "it must be a causal model of text alone", other
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYERS
    kinds |= {type(module).__name__ for module in model.modules() if MIXERS.search(type(module).__name__)}
    kinds |= {"Conv1d" for module in model.modules() if isinstance(module, nn.Conv1d)}
    if kinds:
        yield f" with layers of kind {', '.join(sorted(kinds))}", "tokens may meet in attention alone", other
    if not _swappable(model):
        yield "", "its attention cannot be swapped, as it does not look it up in transformers' registry", other
    heads = config.num_attention_heads
    if heads < state.ulysses.size:
        yield (
            f" with {heads} attention heads on {state.ulysses.size} Ulysses ranks",
            "each Ulysses rank takes at least one head",
            f"use ulysses_size={heads} or less and give the rest to ring_size",
        )
    ropes = _rope_types(getattr(config, "rope_parameters", None) or {}) & LOCAL_ROPE
    if ropes:
        yield (
            f" with rotary type {', '.join(ropes)}",
            "each rank would see another longest position",
            "use another type",
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield (
            f" with attn_logit_softcapping {config.attn_logit_softcapping}",
            "no attention kernel here caps scores",
            "load it with attn_logit_softcapping=None if its weights bear it, or train another model",
        )
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        yield (
            f" with attention dropout {getattr(config, 'attention_dropout', 0) or config.attn_pdrop}",
            "kernels over a split sequence drop nothing here",
            "load it with attention_dropout=0.0 (attn_pdrop=0.0)",
        )
    if getattr(config, "prefix_lm", False) or getattr(getattr(config, "attn_config", None), "prefix_lm", False):
        yield " with prefix_lm", "every token sees only what is before it here", "load it with prefix_lm=False"
    if getattr(config, "output_router_logits", False):
        yield " with output_router_logits", "its router's loss would be one of shards", "set it to False"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        yield "", "its attention must be causal", other


def _swappable(model: PreTrainedModel) -> bool:
    """Whether the model takes attention from the registry, and passes keywords on to it."""
    keywords = inspect.signature(model.forward).parameters.values()
    return model._can_set_attn_implementation() and any(p.kind is p.VAR_KEYWORD for p in keywords)


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """The kinds of rotary embedding in a config, which may have one for each kind of layer."""
    nested = (_rope_types(x) for x in parameters.values() if isinstance(x, dict))
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def choose_kernel(asked: str | None, model: PreTrainedModel, state: ParallelState) -> str:
    """Our name of the attention kernel.

    Args:
        asked: transformers' name or ours; without it what the model was loaded with, where that is a package.
    Raises:
        ConfigError: this machine does not have it.
    """
    loaded = model.config._attn_implementation or ""
    name = asked or (loaded if loaded.startswith("flash_attention") else "auto")
    backend = KERNELS.get(name, ALIASES.get(name, name))
    names = {"auto", *ATTENTION_KERNELS}
    if backend not in names:
        raise ConfigError(f"attention {name!r}", f"it is one of {', '.join([*KERNELS, *sorted(names)])}", "use 'auto'")
    if backend == "auto":
        return backend
    try:  # with a dtype that every kernel takes: autocast may choose another than the model's
        return kernels.choose(backend, state.device.type, torch.bfloat16)
    except ConfigError as error:
        raise ConfigError(
            f"attention {name!r}", error.rule, "use attention='auto', or load the model with sdpa"
        ) from None
