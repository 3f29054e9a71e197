"""Promise 1: any layout trains as one process does. Loss, every gradient, weights after two steps, in fp64.

One test per architecture runs every legal (tensor, Ulysses, data) factorisation of 2, 4 and 8 for the first, and a
sample of them for the others (all with MEGASP_FULL_MATRIX=1).
"""

import itertools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.validate import validate
from megasp.data import IndexedDatasetBuilder
from megasp.errors import ConfigError
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import train_step
from megasp.verify import DEFAULTS, TOLERANCES, compare, in_layout
from tests.ranks import run_ranks

LAYOUTS = [
    Layout(tp=tp, ulysses=ulysses, dp_inner=dp)
    for tp, ulysses, dp in itertools.product((1, 2, 4, 8), repeat=3)
    if tp * ulysses * dp in (2, 4, 8)
]
SAMPLE = 6

GPT2 = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 32,
    "swiglu": False,
    "add_bias_linear": True,
    "num_query_groups": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-gqa-tied-sp": {"sequence_parallel": True},
    "llama-gqa-untied": {"untie_embeddings_and_output_weights": True, "hidden_dropout": 0.0},
    "llama-mqa-qk-norm-sp": {"num_query_groups": 1, "qk_layernorm": True, "sequence_parallel": True},
    "gpt2-mha-dropout": {**GPT2, "attention_dropout": 0.1},
    "gpt2-mha-untied-sp": {**GPT2, "sequence_parallel": True, "untie_embeddings_and_output_weights": True},
    "squared-relu-qkv-bias-partial-rotary": {
        "swiglu": False, "squared_relu": True, "add_qkv_bias": True, "rotary_percent": 0.5, "micro_batch_size": 1,
        "rotary_scaling": "llama3", "hidden_dropout": 0.0,
    },
    "selective-tiled-sp": {
        "recompute_granularity": "selective", "recompute_modules": ("core_attn", "layernorm"), "tiled_mlp": 2,
        "recompute_method": "block", "recompute_num_layers": 1, "sequence_parallel": True, "attention_dropout": 0.1,
    },
    "recompute-sp": {"recompute_granularity": "full", "sequence_parallel": True, "attention_dropout": 0.1},
}  # fmt: skip


def legal(config: Any, layout: Layout) -> bool:
    try:
        validate(in_layout(config, layout), layout.world_size)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_training(name: str) -> None:
    config = from_values(DEFAULTS | ARCHITECTURES[name])
    layouts = [layout for layout in LAYOUTS if legal(config, layout)]
    everything = name == next(iter(ARCHITECTURES)) or os.environ.get("MEGASP_FULL_MATRIX")
    if not everything:
        layouts = random.Random(name).sample(layouts, SAMPLE)
    assert layouts
    for dp in {layout.dp_inner for layout in layouts}:
        # Two microbatches on every rank, where the one process has eight: more would only take longer.
        size = {"micro_batch_size": max(1, config.training.global_batch_size // (2 * dp))}
        batched, some = from_values(DEFAULTS | ARCHITECTURES[name] | size), [it for it in layouts if it.dp_inner == dp]
        for layout, worst in compare(batched, some, 2, reference=config):
            assert worst.overall <= TOLERANCES["fp64"], (layout.name, worst)


def _gathered(layout: Layout, given: dict[str, Any]) -> float:
    """Bytes that this rank sends in all-gathers of the tensor-parallel axis in a step, in residual streams of a
    microbatch: those beyond the same run's without `--distribute-saved-activations`."""
    state = parallel_state.build(layout, torch.device("cpu"))
    found = []
    for shared in (True, False):
        config = in_layout(from_values(given | {"distribute_saved_activations": shared}), layout)
        training = build(config, state, torch.float64)
        before = state.tp.traffic.bytes_sent.get("all_gather", 0)
        with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
            batches = loader.step()
            train_step(training, batches, 1e-3)
        stream = config.training.seq_length * config.model.hidden_size * 8
        found.append((state.tp.traffic.bytes_sent.get("all_gather", 0) - before) / stream / len(batches))
    return found[0] - found[1]


@pytest.mark.parametrize("granularity", ["full", "all-but-attention"])
def test_saved_inputs_shared_out(granularity: str) -> None:
    """They train the same. Half of each layer's input is sent in the backward of a microbatch: of 4 layers, or 2 of a
    stage; statistics of the loss are gathered anyway."""
    given = DEFAULTS | {"recompute_granularity": granularity, "num_layers": 4, "global_batch_size": 2}
    layouts = [Layout(tp=2), Layout(pp=2, tp=2)]
    for layout, worst in compare(from_values(given | {"distribute_saved_activations": True}), layouts, 2):
        assert worst.overall <= TOLERANCES["fp64"], (layout.name, worst)
    for layout, expected in zip(layouts, ([2.0] * 2, [1.0] * 4), strict=True):
        assert run_ranks(_gathered, layout.world_size, layout, given) == pytest.approx(expected)


def test_padded_samples(tmp_path: Path) -> None:
    """Best-fit packing: padding lies on some ranks of a sequence and not on others, and no rank counts it."""
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        for length in lengths:
            builder.add_document(np.random.default_rng(length).integers(0, 90, length))
    values = {
        "data_path": (str(tmp_path / "corpus"),), "mock_data": False, "document_packing": "best-fit", "split": "1",
        "eval_iters": 0, "reset_position_ids": True, "reset_attention_mask": True, "hidden_dropout": 0.0,
    }  # fmt: skip
    layouts = [Layout(ring=2, ulysses=2), Layout(pp=2, tp=2), Layout(dp_inner=2, ulysses=2)]
    for layout, worst in compare(from_values(DEFAULTS | values), layouts, 2):
        assert worst.overall <= TOLERANCES["fp64"], (layout.name, worst)


def test_illegal_layouts_are_refused_before_anything_runs() -> None:
    config = from_values(DEFAULTS)
    with pytest.raises(ConfigError, match="ulysses-size 16"):
        list(compare(config, [Layout(tp=2), Layout(ulysses=16)]))
