"""Every number of a configuration has a range: its ends pass or not as it says, and the sentence holds the value."""

import dataclasses
import math
import typing
from typing import Any

import pytest

from megasp.config.load import GROUPS
from megasp.config.ranges import RANGES, REQUIRED, check_ranges
from megasp.config.validate import validate
from megasp.errors import ConfigError
from tests.unit.config.test_validate import config

HINTS = {name: hint for group in GROUPS.values() for name, hint in typing.get_type_hints(group).items()}
INTEGERS = {name for name in RANGES if int in (HINTS[name], *typing.get_args(HINTS[name]))}


def around(name: str) -> tuple[list[Any], list[Any]]:
    """Values at the ends of a field's range that are inside, and outside of it."""
    allowed, step = RANGES[name], 1 if name in INTEGERS else 1e-6
    number = int if name in INTEGERS else float
    inside = [allowed.low + step if allowed.open_low else allowed.low]
    outside = [allowed.low if allowed.open_low else allowed.low - step, allowed.low - 5]
    if allowed.high < math.inf:
        inside.append(allowed.high - step if allowed.open_high else allowed.high)
        outside.append(allowed.high if allowed.open_high else allowed.high + step)
    return [number(x) for x in inside], [number(x) for x in outside]


ELSEWHERE = {
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
}  # fmt: skip
"""Numbers whose rules are those of `megasp.config.stages`."""


@pytest.mark.parametrize("name", RANGES)
def test_ends(name: str) -> None:
    inside, outside = around(name)
    for value in inside:
        if name not in REQUIRED or value:
            check_ranges(config({name: value})[0])
    for value in outside:
        given, world = config({name: value})
        said = f"--{name.replace('_', '-')} is "
        with pytest.raises(ConfigError, match=said) as caught:
            validate(given, world)
        if name not in REQUIRED or value:
            assert caught.value.got == said + str(value) and caught.value.rule.startswith("it must be ")


@pytest.mark.parametrize("name", REQUIRED)
def test_required_numbers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is not given: .* give --"):
        validate(*config({name: None if name == "lr" else 0}))


def test_every_number_has_a_range() -> None:
    """A new number must say what it may be; lists have rules of their own."""
    numbers = set()
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            hint = HINTS[field.name]
            if {int, float} & {hint, *typing.get_args(hint)} and typing.get_origin(hint) is not tuple:
                numbers.add(field.name)
    assert numbers - set(RANGES) == ELSEWHERE, "numbers without a range"
    assert set(RANGES) <= numbers, "a range of what is no number"


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_numbers_of_stages(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ConfigError):
            validate(*config({"pipeline_model_parallel_size": 2, "world": 2, name: value}))
