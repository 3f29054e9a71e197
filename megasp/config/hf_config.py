"""Hugging Face's config.json as a model of ours, and back, by the tables of `megasp.config.hf_families`. Pure."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megasp.config.hf_families import FAMILIES, REQUIRED, Family
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError

ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "kv_heads", "head_dim", "mlp_size", "padded_vocab_size",
    "position_embedding_type", "normalization", "norm_epsilon", "swiglu", "squared_relu", "add_bias_linear", "qkv_bias",
    "qk_layernorm", "untie_embeddings_and_output_weights", "window_size", "attention_sinks", "rotary_base",
    "rotary_percent", "rotary_scaling", "rotary_factor", "rotary_original_context",
)  # fmt: skip
"""Attributes of `ModelConfig` of which each changes what a model computes."""

_ROPE_SERVED = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None,
    "mscale": None, "mscale_all_dim": None, "truncate": True, "partial_rotary_factor": 1.0,
}  # fmt: skip
"""What config.json may say of a rotary scaling beside its kind, factor and original context."""


def read_directory(directory: Path | str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` and `DataConfig` that a Hugging Face model's directory stands for.

    Args:
        given: fields that the user gave. With a rotary scaling among them the model's own does not count, and the
            context that the model was trained with is known.
    Raises:
        CheckpointError: no config.json, or a model that megasp does not serve.
    """
    _, values = read(config_of(directory))
    scaling = given.get("rotary_scaling")
    if scaling is not None:
        trained = values.pop("original_max_position_embeddings", values.get("max_position_embeddings"))
        values.pop("rotary_scaling_factor", None)
        if scaling in ("yarn", "llama3"):
            values["original_max_position_embeddings"] = trained
    if (Path(directory) / "tokenizer.json").is_file():
        values |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(directory)}
    elif (Path(directory) / "tokenizer.model").is_file():
        model = Path(directory) / "tokenizer.model"
        values |= {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": str(model)}
    return values


def config_of(directory: Path | str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        rule = f"a Hugging Face model is a directory with config.json and safetensors ({error.strerror})"
        raise CheckpointError(f"{path} cannot be read", rule, "check the path") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read", f"it must be JSON ({error})", "download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} cannot be read", "it must be a JSON object", "download it again")
    return config


def read(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the fields of `ModelConfig` that it says.

    Raises:
        CheckpointError: an architecture that is not served, or a setting of it.
    """
    family = _family(config)
    if config.get("quantization_config"):
        raise _unserved("quantization_config", config["quantization_config"], "weights are bf16, fp16 or fp32")
    for key, served in family.served.items():
        given = config.get(key)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in served:
                raise _unserved(
                    key, value, f"megasp computes {family.architecture} with {' or '.join(map(str, served))}"
                )
    values: dict[str, Any] = dict(family.always) | {"make_vocab_size_divisible_by": 1}
    for setting in family.settings:
        value = config.get(setting.key, setting.absent)
        if value is REQUIRED:
            raise _unserved(setting.key, "missing", f"every {family.architecture} says it")
        for name in setting.sets or (setting.ours,):
            before, value_here = values.get(name), setting.read(value)
            if name in values and name not in family.always and before != value_here:
                raise _unserved(setting.key, value, f"here one setting, {name}, says it and another key ({before})")
            values[name] = value_here
    if values.get("num_query_groups"):
        values["group_query_attention"] = True
    if family.rotary:
        values |= _read_rotary(config)
    return family, {name: value for name, value in values.items() if value is not None}


def _family(config: Mapping[str, Any]) -> Family:
    names = [str(name) for name in config.get("architectures") or ()]
    for family in FAMILIES:
        if family.architecture in names or (not names and config.get("model_type") == family.model_type):
            return family
    served = ", ".join(family.architecture for family in FAMILIES)
    got = f"architecture {', '.join(names) or config.get('model_type')}"
    raise CheckpointError(got, f"megasp serves {served}", "convert one of these")


def _unserved(key: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"config.json has {key} {value}", rule, "this model cannot be converted")


def _read_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: of transformers 5 all in `rope_parameters`, of 4 in `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    values: dict[str, Any] = {"rotary_base": float(base)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, served in {**_ROPE_SERVED, "partial_rotary_factor": 1.0}.items():
        given = rope.get(key, config.get(key) if key == "partial_rotary_factor" else None)
        if given is not None and given != served:
            raise _unserved(f"rope {key}", given, f"megasp's rotary scaling has {served}")
    if kind == "default":
        return values
    if kind not in ("linear", "yarn", "llama3"):
        rule = "megasp scales by linear, yarn and llama3 (dynamic changes with the length of each sequence)"
        raise _unserved("rope_type", kind, rule)
    values |= {"rotary_scaling": kind, "rotary_scaling_factor": float(rope["factor"])}
    if kind != "linear":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values["original_max_position_embeddings"] = int(original)
    return values


def write(family: Family, model: ModelConfig, max_positions: int) -> dict[str, Any]:
    """config.json of a model, if the family can say it: without dtype and token ids."""
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {setting.key: setting.write(getattr(model, setting.ours)) for setting in family.settings}
    for setting in family.settings:
        if setting.ours == "max_position_embeddings":
            config[setting.key] = max_positions
    return config | dict(family.constant) | (_write_rotary(model) if family.rotary else {}) | {"use_cache": True}


def _write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Rotary settings stand there twice: as transformers 5 writes them and as 4 reads them."""
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": model.rotary_scaling or "default"}
    if model.rotary_scaling is not None:
        rope["factor"] = model.rotary_factor
    if model.rotary_scaling in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = model.rotary_original_context
    if model.rotary_scaling == "llama3":
        rope |= {key: _ROPE_SERVED[key] for key in ("low_freq_factor", "high_freq_factor")}
    scaling = rope if model.rotary_scaling is not None else None
    return {"rope_parameters": rope, "rope_theta": model.rotary_base, "rope_scaling": scaling}


def family_of(
    model: ModelConfig, max_positions: int, families: Sequence[Family] = FAMILIES
) -> tuple[Family, ModelConfig]:
    """The first of some families that can say all of a model, and the model as it says it.

    A family can if reading what it writes gives the same model.

    Raises:
        CheckpointError: none can; names what the nearest one has instead.
    """
    model = _plain(model)
    missed = [list(_misses(family, model, max_positions)) for family in families]
    for family, misses in zip(families, missed, strict=True):
        if not misses:
            return family, model
    fewest, nearest = min(zip(missed, families, strict=True), key=lambda pair: len(pair[0]))
    name, there = fewest[0]
    raise CheckpointError(
        f"the checkpoint's model has {name.replace('_', '-')} {getattr(model, name)}",
        f"the nearest of Hugging Face's architectures that megasp writes, {nearest.architecture}, has {there}",
        "keep this one in megasp",
    )


def _plain(model: ModelConfig) -> ModelConfig:
    """The same function said in fewer words: NTK scaling is another base, and without rotation nothing is scaled."""
    if model.position_embedding_type != "rope":
        plain = ModelConfig()
        return dataclasses.replace(
            model,
            rotary_base=plain.rotary_base,
            rotary_percent=plain.rotary_percent,
            rotary_scaling=None,
            rotary_scaling_factor=None,
            original_max_position_embeddings=None,
        )
    if model.rotary_scaling == "ntk":
        return dataclasses.replace(model, rotary_base=model.ntk_base, rotary_scaling=None, rotary_scaling_factor=None)
    return model


def _misses(family: Family, model: ModelConfig, max_positions: int) -> Iterator[tuple[str, Any]]:
    """Attributes that the family cannot say, and what it says instead."""
    try:
        said = ModelConfig(**read(write(family, model, max_positions))[1])
    except CheckpointError as error:
        yield "rotary_scaling", error.rule
        return
    for name in ARCHITECTURE:
        if getattr(said, name) != getattr(model, name):
            yield name, getattr(said, name)
