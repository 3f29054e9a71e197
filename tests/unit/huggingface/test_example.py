"""The example's packing of documents into samples."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megasp.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "examples" / "hf_long_context_finetune.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_long_context_finetune", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pack(example: ModuleType) -> None:
    """A document that does not fit goes on in the next sample, from position 0; what fills no sample is left."""
    first, second = example.pack(iter(["abc", "", "defg", "h"]), lambda text: [ord(x) for x in text], 4)
    assert [chr(x) for x in first["input_ids"] + second["input_ids"]] == list("abcdefgh")
    assert first["position_ids"] == [0, 1, 2, 0]
    assert second["position_ids"] == [0, 1, 2, 0]
    assert first["labels"] == [-100, ord("b"), ord("c"), -100]


def test_too_little_text(example: ModuleType) -> None:
    with pytest.raises(ConfigError, match="--seq-length 8 with 2 tokens"):
        example.pack(iter(["ab"]), lambda text: [1] * len(text), 8)
