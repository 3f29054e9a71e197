"""fp8 in every layout: scales are powers of two, so the split of an operand moves nothing but its smallest values.

One step is compared: from the second on weights differ a little, and what lies at the middle of two fp8 values may
round to either.
"""

from typing import Any

import pytest

from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.verify import DEFAULTS, FP8_TOLERANCE, compare

FP8 = DEFAULTS | {"bf16": True, "fp8_format": "hybrid", "micro_batch_size": 1, "global_batch_size": 4, "num_layers": 4}
SP = {"sequence_parallel": True}
ROWWISE = {"fp8_recipe": "rowwise"}
BLOCKS = {
    "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 256, "seq_length": 256, "num_layers": 2,
    "global_batch_size": 2,
}  # fmt: skip
MX, BLOCKWISE = BLOCKS | {"fp8_recipe": "mxfp8"}, BLOCKS | {"fp8_recipe": "blockwise"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "mlp_act", "core_attn")}

CASES: dict[str, tuple[dict[str, Any], Layout]] = {
    "tp": ({}, Layout(tp=2)),
    "sp": (SP, Layout(tp=2)),
    "sp-rowwise-remade": (SP | ROWWISE | SELECTIVE, Layout(tp=2)),
    "sp-remade-ulysses": (SP | SELECTIVE, Layout(tp=2, ulysses=2)),
    "sp-tiled": (SP | {"tiled_mlp": 2, "recompute_granularity": "full"}, Layout(tp=2)),
    "ring": (ROWWISE, Layout(ring=2)),
    "zero3": ({"recompute_granularity": "full"}, Layout(dp_inner=2, zero=3)),
    "zb-h1-sp-zero1": (SP | {"pipeline_schedule": "zb-h1"}, Layout(pp=2, tp=2, dp_inner=2, zero=1)),
    "zbv-rowwise": ({"pipeline_schedule": "zbv"} | ROWWISE, Layout(pp=2)),
    "mxfp8-sp-remade-ulysses": (MX | SP | SELECTIVE | {"seq_length": 512}, Layout(tp=2, ulysses=2)),
    "mxfp8-zb-h1-zero1": (
        MX | SP | {"pipeline_schedule": "zb-h1", "global_batch_size": 4},
        Layout(pp=2, tp=2, dp_inner=2, zero=1),
    ),
    "blockwise-sp-remade": (BLOCKWISE | SP | SELECTIVE, Layout(tp=2)),
    "blockwise-ring-zero3": (BLOCKWISE | {"recompute_granularity": "full"}, Layout(ring=2, dp_inner=2, zero=3)),
    "blockwise-chunks": (BLOCKWISE | {"sequence_chunks": 2, "seq_length": 512}, Layout(ulysses=2)),
    "ends-e4m3": (SP | {"first_last_layers_bf16": True, "fp8_format": "e4m3"}, Layout(pp=2, tp=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_training(name: str) -> None:
    given, layout = CASES[name]
    [(_, worst)] = compare(from_values(FP8 | given), [layout], steps=1)
    assert worst.overall <= FP8_TOLERANCE, worst
