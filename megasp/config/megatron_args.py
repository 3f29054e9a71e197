"""Megatron-LM's settings of a run, as its checkpoints keep them, in ours. Pure.

Its `args` are argparse's namespace, so most names are those of our fields. The tables say the others: what is renamed,
and which settings change what a model computes and are served with some values alone.
"""

import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from megasp.config.flags import build
from megasp.config.schema import Config, DataConfig, LossScaleConfig, ModelConfig, OptimizerConfig, TrainingConfig
from megasp.errors import CheckpointError

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "loss_scaling": LossScaleConfig,
}
"""What a run takes over. Its layout, checkpoints and logging are chosen anew."""

OWN = ("attention_backend", "exit_interval", "exit_duration_in_mins", "num_workers", "num_query_groups", "vocab_size")
"""Fields of these groups that are of this machine alone, or that are set by rules below."""

SERVED: dict[str, tuple[Any, ...]] = {
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_override_pattern": (None,),
    "experimental_attention_variant": (None,),
    "linear_attention_type": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "rotary_interleaved": (False,),
    "mrope_section": (None,),
    "no_rope_freq": (None,),
    "window_attn_skip_freq": (None,),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "optimizer": ("adam",),
    "decoupled_lr": (None,),
}
"""Setting -> its values that megasp computes; one that is missing is served."""

Rule = tuple[str, Callable[[Any], dict[str, Any]]]


def _window(given: Any) -> dict[str, Any]:
    before, after = given if isinstance(given, tuple | list) else (given, 0)
    if after not in (0, -1):
        raise _unserved("window_size", given, "a token never sees those after it")
    return {} if before == -1 else {"window_size": before}


RULES: tuple[Rule, ...] = (
    ("layernorm_epsilon", lambda given: {"norm_epsilon": given}),
    ("use_rotary_position_embeddings", lambda given: {"position_embedding_type": "rope"} if given else {}),
    ("use_rope_scaling", lambda given: {"rotary_scaling": "llama3"} if given else {}),
    (
        "rotary_seq_len_interpolation_factor",
        lambda given: {"rotary_scaling": "linear", "rotary_scaling_factor": float(given)},
    ),
    ("window_size", _window),
)
"""Settings whose names or values differ here; in order, the last that speaks wins."""

NOT_CARRIED = {
    "lr_decay_samples": "--lr-decay-iters",
    "lr_warmup_samples": "--lr-warmup-iters",
    "lr_wsd_decay_samples": "--lr-wsd-decay-iters",
    "start_weight_decay": "--weight-decay",
    "data_args_path": "--data-path",
    "per_split_data_args_path": "--train-data-path",
    "tokenizer_type": "--tokenizer-type",
    "lr_decay_style": "--lr-decay-style",
}
"""Settings of training that may not have been taken over -> the flags to say them by."""


def config_of(args: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration of a run, and what the user must say himself.

    Args:
        args: of the checkpoint; nothing where it keeps none.
        model: fields of `ModelConfig` that the user gave; they win.
    Raises:
        CheckpointError: a model that megasp does not compute.
    """
    for name, served in SERVED.items():
        if args.get(name) is not None and args[name] not in served:
            raise _unserved(name, args[name], f"megasp serves {' or '.join(map(str, served))}")
    values: dict[str, Any] = {}
    for group in GROUPS.values():
        hints = typing.get_type_hints(group)
        for field in fields(group):
            value = args.get(field.name)
            if value is not None and field.name not in OWN and _fits(value, hints[field.name], field.metadata):
                values[field.name] = _plain(value, hints[field.name])
    for name, rule in RULES:
        if args.get(name) is not None:
            values.pop(name, None)
            values |= rule(args[name])
    if values.get("rotary_scaling") == "llama3":
        values["rotary_scaling_factor"] = float(args.get("rope_scaling_factor") or 8.0)
    if args.get("group_query_attention"):
        values["num_query_groups"] = args.get("num_query_groups")
    if args.get("train_samples"):
        values.pop("train_iters", None)  # it is computed from it
    if values.get("data_path") or values.get("train_data_path"):
        values["data_order"] = "megatron"
    values |= {**_vocabulary(args), **model}
    config = Config(**{name: build(group, values) for name, group in GROUPS.items()})
    if config.model.num_query_groups and not config.model.group_query_attention:
        config = replace(config, model=replace(config.model, group_query_attention=True))
    taken = {name for name in values if values[name] == args.get(name)}
    notes = [f"{name} {args[name]}" for name in NOT_CARRIED if args.get(name) not in (None, "") and name not in taken]
    return config, [f"{note} is not taken over: give {NOT_CARRIED[note.split()[0]]}" for note in notes]


def _vocabulary(args: Mapping[str, Any]) -> dict[str, Any]:
    """The vocabulary, so that it is padded as it was: there to a multiple that grows with the tensor-parallel size."""
    padded, vocab = args.get("padded_vocab_size"), args.get("vocab_size")
    if padded is None:
        return {} if vocab is None else {"vocab_size": vocab}
    ids = {}
    if vocab is not None and args.get("tokenizer_type") == "NullTokenizer":
        ids, vocab = {"tokenizer_model": str(vocab)}, vocab + 1  # its end-of-document token
    multiple = (args.get("make_vocab_size_divisible_by") or 1) * (args.get("tensor_model_parallel_size") or 1)
    if vocab is None or -(-vocab // multiple) * multiple != padded:
        vocab, multiple = padded, 1
    return ids | {"vocab_size": vocab, "make_vocab_size_divisible_by": multiple}


def _fits(value: Any, hint: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a setting has the type of our field of that name, and one of its values."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else None
        return items is not None and all(isinstance(item, str | int | float) for item in items)
    numbers = isinstance(value, int) and not isinstance(value, bool) and float in kinds
    right = any(type(value) is kind for kind in kinds) or numbers
    return right and (metadata.get("choices") is None or value in metadata["choices"])


def _plain(value: Any, hint: Any) -> Any:
    """The value in the type of its field."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if float in (hint, *typing.get_args(hint)) else value


def _unserved(name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's model has {name} {value}", rule, "this model cannot be converted")
