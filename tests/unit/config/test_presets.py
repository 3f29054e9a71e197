"""Presets are made of real fields, and their parameter counts are the published ones."""

import dataclasses
from typing import Any

import pytest

from megasp.config.flags import build
from megasp.config.presets import PRESETS
from megasp.config.schema import ModelConfig, TrainingConfig
from megasp.model.flops import parameter_count


def model(name: str, **changes: Any) -> ModelConfig:
    return build(ModelConfig, PRESETS[name] | changes)


def test_values_are_of_fields() -> None:
    fields = {field.name for config in (ModelConfig, TrainingConfig) for field in dataclasses.fields(config)}
    for name, values in PRESETS.items():
        assert set(values) <= fields, name
        assert model(name).hidden_size == model(name).num_attention_heads * model(name).head_dim, name


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3.1-405b", 405_853_388_800)],
)
def test_llama_counts(name: str, published: int) -> None:
    assert parameter_count(model(name)) == published


def test_gpt2_count() -> None:
    assert parameter_count(model("gpt2-125m", make_vocab_size_divisible_by=1)) == 124_439_808
    assert parameter_count(model("gpt2-125m")) == 124_439_808 + (50304 - 50257) * 768
