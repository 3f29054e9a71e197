"""A layer in chunks of the sequence trains as the whole layer of one process does, in every layout that splits it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.data import IndexedDatasetBuilder
from megasp.verify import DEFAULTS, TOLERANCES, compare
from tests.parity.test_layouts import GPT2

BASE = DEFAULTS | {"seq_length": 120, "global_batch_size": 2, "micro_batch_size": 2, "sequence_parallel": True}
LAYOUTS = [Layout(), Layout(ulysses=2), Layout(tp=2), Layout(ulysses=2, tp=2), Layout(ulysses=4), Layout(pp=2)]
CASES: dict[str, tuple[dict[str, Any], list[Layout]]] = {
    "2": ({"sequence_chunks": 2, "tiled_mlp": 3}, LAYOUTS),
    "3-window": ({"sequence_chunks": 3, "window_size": 30, "attention_sinks": 2}, LAYOUTS[1:4]),
    "5-full": (
        {"sequence_chunks": 5, "recompute_granularity": "full", "ulysses_head_chunks": 2, "num_query_groups": 8},
        LAYOUTS[1:4],
    ),
    "5-gpt2": ({**GPT2, "max_position_embeddings": 120, "attention_dropout": 0.1, "sequence_chunks": 5}, LAYOUTS[1:4]),
    "3-zero": ({"sequence_chunks": 3, "micro_batch_size": 1}, [Layout(dp_inner=2, zero=3), Layout(dp_inner=2, zero=1)]),
    "3-mqa": ({"sequence_chunks": 3, "num_query_groups": 1, "sequence_parallel": False}, LAYOUTS[1:5]),
}


@pytest.mark.parametrize("name", CASES)
def test_same_training(name: str) -> None:
    values, layouts = CASES[name]
    config = from_values(BASE | values)
    plain = from_values(BASE | values | {"sequence_chunks": 1, "tiled_mlp": 1, "recompute_granularity": None})
    for layout, worst in compare(config, layouts, 2, reference=plain):
        assert worst.overall <= TOLERANCES["fp64"], (layout.name, worst)


def test_documents(tmp_path: Path) -> None:
    """Documents that do not see each other, across chunks and within, with positions of their own."""
    draws = np.random.default_rng(0)
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        for length in draws.integers(1, 90, 60):
            builder.add_document(draws.integers(0, 90, length))
    values = {
        "data_path": (str(tmp_path / "corpus"),), "mock_data": False, "split": "1", "eval_iters": 0,
        "reset_position_ids": True, "reset_attention_mask": True, "micro_batch_size": 1,
    }  # fmt: skip
    config, plain = (from_values(BASE | values | {"sequence_chunks": chunks}) for chunks in (5, 1))
    for layout, worst in compare(config, [Layout(), Layout(ulysses=2, tp=2), Layout(ulysses=3)], 2, reference=plain):
        assert worst.overall <= TOLERANCES["fp64"], (layout.name, worst)
