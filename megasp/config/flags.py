"""Command-line flags and YAML entries, generated from frozen dataclasses; argparse parses.

A field declares its flag beside itself:

    @dataclass(frozen=True, kw_only=True)
    class Options:
        workers: int = flag(1, "processes that tokenize")
        add_bias_linear: bool = flag(True, "biases in linear layers", off="--disable-bias-linear")

and `parse(Options, parser, argv)` returns an `Options`. Values rank: flag, then `--config FILE.yaml`, then default.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megasp.errors import ConfigError

C = TypeVar("C")
REQUIRED = dataclasses.MISSING


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    off: str | None = None,
    name: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its command-line flag (`--field-name` unless `name` says otherwise).

    Args:
        default: the value without the flag; `REQUIRED` for none.
        help: one sentence; argparse appends the default.
        choices: the values allowed.
        off: for a field that is True by default, the flag that switches it off.
        name: the flag, where it is not the field's name; without dashes it is a positional argument.
    """
    metadata = {"help": help, "choices": choices, "off": off, "name": name, "metavar": metavar}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_string(field: dataclasses.Field[Any]) -> str:
    """The flag of a field, as a user types it."""
    return field.metadata["name"] or field.metadata["off"] or "--" + field.name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, options: type, required: bool = True) -> None:
    """Add the flags of one dataclass as a group titled by the first line of its docstring."""
    group = parser.add_argument_group((options.__doc__ or options.__name__).splitlines()[0].rstrip("."))
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        action = group.add_argument(option_string(field), **_argument(field, hints[field.name], required))
        action.optional = _optional(hints[field.name]) is not None  # type: ignore[attr-defined]


def _argument(field: dataclasses.Field[Any], hint: Any, required: bool) -> dict[str, Any]:
    """argparse's keywords for one field; SUPPRESS tells a flag that was given from one that was not."""
    default = field.default
    help_text = field.metadata["help"].replace("%", "%%")
    absent = default in (None, REQUIRED, (), "") or (default == 0 and isinstance(default, int))
    shown = "" if absent else default
    shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else str(shown)
    arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if hint is bool:
        arguments["action"] = "store_false" if field.metadata["off"] else "store_true"
        arguments["help"] = ("switch off: " if field.metadata["off"] else "") + help_text
        return arguments
    arguments["help"] = help_text + (f" (default: {shown})" if shown else "")
    item_type = _item_type(hint)
    if typing.get_origin(_optional(hint) or hint) is tuple:
        arguments |= {
            "nargs": "*" if _may_be_empty(field) else "+",
            "action": "extend",
        }  # `--x a b` and `--x a --x b` say the same
    arguments["type"] = item_type
    arguments["choices"] = field.metadata["choices"]
    arguments["metavar"] = field.metadata["metavar"] or (None if field.metadata["choices"] else _metavar(item_type))
    if option_string(field).startswith("-"):
        arguments["required"] = required and default is REQUIRED
    else:
        del arguments["dest"]  # argparse names a positional argument by itself
    return arguments


def _may_be_empty(field: dataclasses.Field[Any]) -> bool:
    """Whether it is a list of positional arguments with a default."""
    return not option_string(field).startswith("-") and field.default is not REQUIRED


def _metavar(item_type: type) -> str:
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(item_type, item_type.__name__.upper())


def _optional(hint: Any) -> Any:
    """T of `T | None`, else None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner[0] if len(inner) == 1 else None
    return None


def _item_type(hint: Any) -> type:
    hint = _optional(hint) or hint
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


class Parser(argparse.ArgumentParser):
    """argparse that raises `ConfigError`, and answers an unknown flag with the nearest known one."""

    def __init__(self, *, refused: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.refused = refused or {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise self.unknown(unknown[0])
        return known

    def unknown(self, name: str) -> ConfigError:
        """Why `name` is not taken: its reason if Megatron-LM has it, else the nearest flag that exists."""
        name = name.split("=")[0]
        if name in self.refused:
            return ConfigError(f"{name} is not supported", self.refused[name], f"leave {name} out")
        near = difflib.get_close_matches(name, self._option_string_actions, 1, 0.5)
        return ConfigError(
            f"unknown argument {name}",
            "every flag must be one that --help lists",
            f"did you mean {near[0]}?" if near else "see --help",
        )

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message, "flags and values must be as --help says", f"see `{self.prog} --help`")


def read_yaml(path: Path, groups: Sequence[type], refused: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Values by field name from a YAML file whose keys are flag names (dashes or underscores).

    Raises:
        ConfigError: no such file, not a mapping, an unknown key, or a value of another type.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"--config {path}", f"it must be a readable file ({error.strerror})", "check the path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace("\n", " ")
        raise ConfigError(f"--config {path}", f"it must be valid YAML ({where})", "mend that line") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}", "it must hold `flag-name: value` lines", "see examples/tiny.yaml")
    parser = Parser(prog=str(path), add_help=False, refused=refused)
    for group in groups:
        add_flags(parser, group, required=False)
    actions = {action.dest: action for action in parser._actions} | {
        name.lstrip("-").replace("-", "_"): action for name, action in parser._option_string_actions.items()
    }
    values: dict[str, Any] = {}
    for key, value in document.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise parser.unknown("--" + str(key).replace("_", "-"))
        values[action.dest] = _yaml_value(parser, action, key, value)
    return values


def _yaml_value(parser: Parser, action: argparse.Action, key: str, value: Any) -> Any:
    """Check one YAML value by the rules of its flag."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} in {parser.prog}", "a switch is true or false", f"write `{key}: true`")
        is_off_flag = isinstance(action, argparse._StoreFalseAction) and str(key).replace("-", "_") != action.dest
        return value != is_off_flag
    if value is None and action.optional:  # type: ignore[attr-defined]
        return None
    items = value if isinstance(value, list) and action.nargs == "+" else [value]
    if any(item is None or isinstance(item, list | dict) for item in items):
        shape = "a list of values" if action.nargs == "+" else "one value"
        raise ConfigError(f"{key}: {value!r} in {parser.prog}", f"it holds {shape}", "mend that line")
    try:
        given = vars(parser.parse_known_args([action.option_strings[0], *map(str, items)])[0])
    except ConfigError as error:
        raise ConfigError(f"{key}: {value!r} in {parser.prog}", error.got, "mend that line") from None
    return given[action.dest]


def build(options: type[C], values: Mapping[str, Any]) -> C:
    """An instance of a dataclass from the entries of `values` that are its fields; lists become tuples."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})


def parse(options: type[C], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> C:
    """Parse one command's flags into its dataclass."""
    add_flags(parser, options)
    return build(options, vars(parser.parse_args(argv)))
