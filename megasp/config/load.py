"""Reads a run's configuration: defaults, `--model PRESET` or `--load-hf DIR`, `--config FILE.yaml`, flags; the last
that speaks wins."""

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megasp.config.flags import Parser, add_flags, build, flag, option_string, read_yaml
from megasp.config.hf_config import read_directory
from megasp.config.megatron_flags import REFUSED, translate
from megasp.config.presets import PRESETS
from megasp.config.schema import Config, ModelConfig
from megasp.errors import ConfigError

GROUPS: dict[str, type] = {name: hint for name, hint in typing.get_type_hints(Config).items() if name != "__doc__"}
"""Field of `Config` -> its dataclass."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Configuration."""

    model: str | None = flag(None, "start from a known architecture", choices=tuple(PRESETS))
    config: str | None = flag(None, "YAML file of `flag-name: value` lines; flags win over it", metavar="FILE")
    print_config: bool = flag(False, "print the effective configuration as YAML, and stop")


def parser(prog: str, description: str, extra: Sequence[type] = ()) -> Parser:
    """A parser of every flag of a run, and those of `extra` dataclasses."""
    made = Parser(
        prog=prog,
        description=description,
        refused=REFUSED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in (Source, *extra, *GROUPS.values()):
        add_flags(made, group)
    return made


def load(
    argv: Sequence[str], parser: Parser, extra: type | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Config, Source, Any, list[str]]:
    """The configuration that a command line says.

    Args:
        extra: a dataclass of the command's own flags.
        defaults: field name -> value, where a command has other defaults than pretraining.
    Returns:
        The configuration, where it came from, an instance of `extra`, and what to tell the user about flags that
        megasp needs not.
    """
    argv, notes = translate(argv)
    given = vars(parser.parse_args(argv))
    source = build(Source, given)
    in_file = from_file(source)
    values = dict(defaults or {})
    hugging_face = given.get("load_hf", in_file.get("load_hf"))
    if (
        source.model or source.config or hugging_face
    ):  # which say what the model is: a command's own architecture would mix with theirs
        architecture = {field.name for field in dataclasses.fields(ModelConfig)}
        values = {name: value for name, value in values.items() if name not in architecture}
    preset = source.model or in_file.get("model")
    if preset and hugging_face:
        rule = "each says what the model is"
        named, out = (f"--model {preset}", "--model") if source.model else (f"model: {preset} in {source.config}", "it")
        raise ConfigError(f"{named} and --load-hf {hugging_face}", rule, f"leave {out} out")
    values |= PRESETS[preset] if preset else {}
    values |= read_directory(hugging_face, in_file | given) if hugging_face else {}
    values |= in_file | given
    if values.get("vocab_file") and values.get("merge_file"):
        values.setdefault("tokenizer_type", "GPT2BPETokenizer")  # as in Megatron-LM's pretrain_gpt.py
    if values.get("num_query_groups") and not values.get("group_query_attention"):
        raise ConfigError(
            f"--num-query-groups {values['num_query_groups']} without --group-query-attention",
            "Megatron-LM ignores the number then, and gives every query head its own key and value head",
            "add --group-query-attention, or leave out --num-query-groups",
        )
    return from_values(values), source, build(extra, given) if extra else None, notes


def from_file(source: Source) -> dict[str, Any]:
    """Values of the --config file, by field name; none without one."""
    return read_yaml(Path(source.config), (_PresetKey, *GROUPS.values()), REFUSED) if source.config else {}


@dataclass(frozen=True, kw_only=True)
class _PresetKey:
    """The one key of a YAML file that is no field of the configuration."""

    model: str = flag("", "preset", choices=tuple(PRESETS))


def from_values(values: dict[str, Any]) -> Config:
    """A configuration from field name -> value."""
    return Config(**{name: build(group, values) for name, group in GROUPS.items()})


def to_yaml(config: Config) -> str:
    """The configuration as a file that `--config` reads back, grouped, values that were not given left out."""
    lines = []
    for name, group in GROUPS.items():
        part = getattr(config, name)
        values = {
            option_string(field).lstrip("-"): _plain(field, getattr(part, field.name))
            for field in dataclasses.fields(group)
            if getattr(part, field.name) not in (None, ())
        }
        if values:
            lines.append(f"# {name}\n" + yaml.safe_dump(values, sort_keys=False))
    return "\n".join(lines)


def _plain(field: dataclasses.Field[Any], value: Any) -> Any:
    if field.metadata["off"]:
        return not value
    return list(value) if isinstance(value, tuple) else value


def todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of a model under today's names: Llama 3.1's rotary scaling was a switch of its own once."""
    now = {name: value for name, value in values.items() if name not in ("use_rope_scaling", "rope_scaling_factor")}
    if values.get("use_rope_scaling"):
        now |= {"rotary_scaling": "llama3", "rotary_scaling_factor": values["rope_scaling_factor"]}
    return now


def from_dict(groups: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `dataclasses.asdict`, for checkpoints; entries of other versions are refused by name."""
    values: dict[str, Any] = {}
    for name, stored in groups.items():
        entries = todays_names(stored)
        known = {field.name for field in dataclasses.fields(GROUPS[name])} if name in GROUPS else set()
        unknown = sorted(entries.keys() - known)
        if unknown:
            raise ConfigError(
                f"stored configuration has {name}.{unknown[0]}", "this version does not know it", "update megasp"
            )
        values |= entries
    return from_values(values)
