"""Every rule of `validate`: its sentence holds what was given, the rule, and values that themselves pass."""

import ast
import dataclasses
import inspect
import traceback
from types import ModuleType
from typing import Any

import pytest

from megasp.config import data_rules, layout_rules, precision_rules, profile, schedule_rules
from megasp.config import validate as module
from megasp.config.layout_rules import nearest
from megasp.config.load import from_values
from megasp.config.presets import PRESETS
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.errors import ConfigError
from tests.unit.config.validate_cases import BASE, CASES, CP, TP, Case


def config(given: dict[str, Any]) -> tuple[Config, int]:
    values = BASE | given
    return from_values(values), values.pop("world", 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rule(case: Case) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(*config(case.given))
    error = caught.value
    assert case.got in error.got, str(error)
    assert case.rule in error.rule, str(error)
    for words, change in case.cures.items():
        assert words in error.fix, f"{words!r} is not in the fix of: {error}"
        validate(*config(case.given | change))  # what the sentence proposes must pass


RULES = [module, data_rules, layout_rules, precision_rules, profile, schedule_rules]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.__name__)
def test_every_rule_has_a_case(rules: ModuleType) -> None:
    """Each place that refuses something is reached by a case above."""
    source = inspect.getsource(rules)
    places = []
    for node in ast.walk(ast.parse(source)):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if isinstance(node, ast.Raise) or (called and node.func.id in ("must", "divides", "_positive")):
            places.append(range(node.lineno, node.end_lineno + 1))
    reached = set()
    for case in CASES:
        try:
            validate(*config(case.given))
        except ConfigError as error:
            frames = traceback.extract_tb(error.__traceback__)
            reached |= {frame.lineno for frame in frames if frame.filename == rules.__file__}
    lines = source.splitlines()
    missed = [lines[place[0] - 1].strip() for place in places if reached.isdisjoint(place)]
    assert places and not missed, f"rules without a case: {missed}"


def test_base_passes_and_changes_nothing() -> None:
    given, world = config({"world": 8, TP: 2, "ulysses_size": 2, "sequence_parallel": True})
    before = dataclasses.replace(given)
    assert validate(given, world).name == "tp2-pp1-u2-r1-dp2" and given == before


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ({CP: 2, "cp_comm_type": "a2a"}, "tp1-pp1-u2-r1-dp2"),
        ({CP: 4, "cp_comm_type": "a2a"}, "tp1-pp1-u4-r1-dp1"),
        ({"ulysses_size": 2}, "tp1-pp1-u2-r1-dp2"),
        ({CP: 2, "ulysses_size": 2}, "tp1-pp1-u2-r1-dp2"),
        ({CP: 1}, "tp1-pp1-u1-r1-dp4"),
        ({}, "tp1-pp1-u1-r1-dp4"),
        ({TP: 2, CP: 2, "cp_comm_type": "a2a"}, "tp2-pp1-u2-r1-dp1"),
    ],
)
def test_context_parallel_means_ulysses(flags: dict[str, Any], layout: str) -> None:
    assert validate(*config(flags | {"world": 4})).name == layout


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal(name: str) -> None:
    """On a GPU of a laptop's imagination: nothing here asks the machine."""
    extra = {"vocab_size": 512, "mock_data": True, "train_iters": 10, "lr": 1e-4, "bf16": True}
    tp = 4 if name == "gpt2-125m" else 2
    given = from_values(extra | PRESETS[name] | {TP: tp, "sequence_parallel": True})
    assert validate(given, 8, "cuda").tp == tp


def test_nearest() -> None:
    assert nearest(7, lambda n: n % 4 == 0) == "4 or 8"
    assert nearest(3, lambda n: n % 4 == 0) == "4"
    assert nearest(5, lambda n: 12 % n == 0, 13) == "4 or 6"
    assert nearest(99, lambda n: 12 % n == 0, 13) == "12"
    assert nearest(4, lambda n: n % 4 == 0) == "4 or 8", "a value that works itself comes first"
