"""Megatron-LM's settings of a run, as its checkpoints keep them, in ours. Pure.

Its `args` are argparse's namespace, so most names are those of our fields. The tables say the others: what is renamed,
and which settings change what a model computes and are served with some values alone.
"""

import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from megasp.config.flags import build
from megasp.config.ranges import check_ranges
from megasp.config.schema import Config, DataConfig, LossScaleConfig, ModelConfig, OptimizerConfig, TrainingConfig
from megasp.config.validate import check_model
from megasp.errors import CheckpointError

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "loss_scaling": LossScaleConfig,
}
"""What a run takes over. Its layout, checkpoints and logging are chosen anew."""

OWN = (
    "attention_backend", "exit_interval", "exit_duration_in_mins", "num_workers", "num_query_groups", "vocab_size",
    "make_vocab_size_divisible_by", "rotary_scaling", "rotary_scaling_factor", "original_max_position_embeddings",
)  # fmt: skip
"""Fields of these groups that are of a machine alone, that rules below set, or whose names mean something else there
(of latent attention)."""

SERVED: dict[str, tuple[Any, ...]] = {
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_type": (None,),
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
    "lr_decay_style": "--lr-decay-style",
    "optimizer": "nothing, for AdamW is the optimizer here",
    "weight_decay_incr_style": "a constant --weight-decay",
    "data_args_path": "--data-path",
    "per_split_data_args_path": "--train-data-path",
    "tokenizer_type": "--tokenizer-type and what it needs",
}
"""Settings of training that may not be taken over -> what to give instead."""
_NOTHING = {"weight_decay_incr_style": ("constant",)}
"""Their values that ask for nothing (None never does)."""


def config_of(args: Mapping[str, Any], given: Mapping[str, Any], rows: int) -> tuple[Config, list[str]]:
    """The configuration of a run, and what of its settings is not in it.

    Args:
        args: of the checkpoint; nothing where it keeps none.
        given: fields of the configuration that the user gave; they win.
        rows: of its embedding.
    Raises:
        CheckpointError: a model that megasp does not compute.
        ConfigError: sizes that cannot be, or do not go together.
    """
    for name, served in SERVED.items():
        if args.get(name) is not None and args[name] not in served:
            values_served = " or ".join("unset" if value is None else str(value) for value in served)
            raise _unserved(name, args[name], f"megasp computes models with it {values_served}")
    values = dict(_same_names(args))
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
    if values.get("reset_position_ids") or values.get("reset_attention_mask"):
        values["eod_starts_document"] = True  # its only rule
    if values.get("position_embedding_type") != "rope":  # what they are, Megatron-LM keeps all the same
        values = {name: value for name, value in values.items() if not name.startswith("rotary_")}
    values |= {**_vocabulary(args, rows), **given}
    if values.get("num_query_groups"):
        values["group_query_attention"] = True
    config = Config(**{name: build(group, values) for name, group in GROUPS.items()})
    model = Config(model=config.model, training=TrainingConfig(seq_length=1), optimizer=OptimizerConfig(lr=1.0))
    check_ranges(model)  # the rest is checked where the run goes on
    check_model(model)
    return config, list(_notes(args, values))


def _same_names(args: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that are called the same here, and fit."""
    for group in GROUPS.values():
        hints = typing.get_type_hints(group)
        for field in fields(group):
            value, hint = args.get(field.name), hints[field.name]
            if value is not None and field.name not in OWN and _fits(value, hint, field.metadata["choices"]):
                yield field.name, _plain(value, hint)


def _notes(args: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """What of a run's settings differs here, in words."""
    for name, instead in NOT_CARRIED.items():
        given = args.get(name)
        if given is not None and given not in _NOTHING.get(name, ()) and values.get(name) != given:
            yield f"{name} {given} is not taken over: give {instead}"
    gelu = not values.get("swiglu") and not values.get("squared_relu")
    if gelu and args.get("bias_gelu_fusion") is False and not args.get("openai_gelu"):
        yield "bias_gelu_fusion False: GELU was in its erf form there, and is in its tanh form here (up to 5e-4 away)"


def _vocabulary(args: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The vocabulary, so that it is padded as it was: there to a multiple that grows with the tensor-parallel size."""
    padded, vocab = args.get("padded_vocab_size") or rows, args.get("vocab_size")
    ids = {}
    if vocab is not None and args.get("tokenizer_type") == "NullTokenizer":
        ids, vocab = {"tokenizer_model": str(vocab)}, vocab + 1  # its end-of-document token
    multiple = (args.get("make_vocab_size_divisible_by") or 1) * (args.get("tensor_model_parallel_size") or 1)
    if vocab is None or -(-vocab // multiple) * multiple != padded:
        vocab, multiple = padded, 1
    return ids | {"vocab_size": vocab, "make_vocab_size_divisible_by": multiple}


def _fits(value: Any, hint: Any, choices: Collection[Any] | None) -> bool:
    """Whether a setting has the type of our field of that name, and one of its values."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float in kinds or (int in kinds and value == int(value))
    return type(value) in kinds and (choices is None or value in choices)


def _plain(value: Any, hint: Any) -> Any:
    """The value in the type of its field."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, list | tuple):
        return tuple(kinds[0](item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if float in kinds else int(value)
    return value


def _unserved(name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's model has {name} {value}", rule, "this model cannot be converted")
