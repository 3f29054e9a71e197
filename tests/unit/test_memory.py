"""The account of memory against what the real step allocates, counted exactly on tensors without memory."""

from typing import Any

import pytest

from megasp import dry_run, memory
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.training.memory import account

SMALL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 8,
    "group_query_attention": True, "num_query_groups": 4, "position_embedding_type": "rope", "normalization": "RMSNorm",
    "swiglu": True, "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "vocab_size": 512,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "seq_length": 4096, "bf16": True,
    "mock_data": True, "train_iters": 1, "lr": 1e-3,
}  # fmt: skip
GPT2 = SMALL | {
    "group_query_attention": False, "num_query_groups": None, "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 4096, "normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False, "hidden_dropout": 0.1, "micro_batch_size": 2, "bf16": False,
}  # fmt: skip
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
SP = {TP: 2, "sequence_parallel": True}
SELECTIVE = {"recompute_granularity": "selective"}

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "fp32": ({"bf16": False}, 1),
    "tp": ({TP: 2}, 2),
    "sp": (SP, 4),
    "gpt2": ({**GPT2}, 1),
    "gpt2-tp": (GPT2 | SP, 2),
    "unfused": ({"attention_backend": "unfused", "seq_length": 2048}, 1),
    "attention-dropout": ({"attention_dropout": 0.1, "seq_length": 2048}, 1),
    "distributed": ({TP: 4, "recompute_granularity": "full", "distribute_saved_activations": True, "num_layers": 8}, 4),
    "distributed-pp": (
        {TP: 2, PP: 2, "recompute_granularity": "all-but-attention", "distribute_saved_activations": True},
        4,
    ),
    "full": (SP | {"recompute_granularity": "full"}, 2),
    "groups": ({"recompute_granularity": "full", "recompute_num_layers": 2}, 1),
    "block": ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}, 1),
    "all-but-attention": ({"recompute_granularity": "all-but-attention"}, 1),
    "core": (SELECTIVE | {"ulysses_size": 2}, 2),
    "mlp": (SELECTIVE | SP | {"recompute_modules": ("mlp",)}, 2),
    "norms": (SELECTIVE | {"recompute_modules": ("layernorm", "mlp_act")}, 1),
    "mlp-norms": (SELECTIVE | {"recompute_modules": ("layernorm", "mlp")}, 1),
    "tiled": (SP | {"tiled_mlp": 8}, 2),
    "tiled-full": ({"tiled_mlp": 8, "recompute_granularity": "full"}, 1),
    "ulysses": ({"ulysses_size": 4}, 4),
    "ring": ({"ring_size": 4}, 4),
    "ring-tiled-full": ({"ring_size": 4, "tiled_mlp": 8, "recompute_granularity": "full"}, 4),
    "tiles-by-budget": (SP | {"activation_tile_mb": 1}, 2),
    "chunks": ({"sequence_chunks": 4}, 1),
    "chunks-fp32": ({"sequence_chunks": 2, "bf16": False}, 1),
    "chunks-full": (SP | {"sequence_chunks": 8, "recompute_granularity": "full"}, 2),
    "chunks-tiles": ({"sequence_chunks": 4, "tiled_mlp": 16, "ulysses_size": 2}, 2),
    "u-r-tp": ({"ulysses_size": 2, "ring_size": 2} | SP, 8),
    "zero1": ({"data_parallel_sharding_strategy": "optim", "global_batch_size": 4}, 2),
    "zero2": ({"data_parallel_sharding_strategy": "optim_grads", "global_batch_size": 4}, 2),
    "zero3": ({"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 4}, 2),
    "1f1b": ({PP: 2, "global_batch_size": 4}, 2),
    "interleaved": ({PP: 2, "global_batch_size": 4, "num_virtual_stages_per_pipeline_rank": 2}, 2),
    "zb-h1": ({PP: 2, "global_batch_size": 4, "pipeline_schedule": "zb-h1"}, 2),
    "zbv": ({PP: 2, "global_batch_size": 4, "pipeline_schedule": "zbv"}, 2),
}


def configured(given: dict[str, Any], world: int) -> tuple[Config, Layout]:
    config = from_values(SMALL | given)
    return config, validate(config, world)


@pytest.mark.parametrize("name", CASES)
def test_account_is_the_count(name: str) -> None:
    config, layout = configured(*CASES[name])
    for rank in range(layout.pp):
        expected = account(config, layout, rank)
        counted = dry_run.count(config, layout, expected.rank)
        if not layout.zero:  # which gathers weights and makes gradients in the step
            assert expected.static == pytest.approx(counted.built, rel=1e-3), "states"
        assert expected.total == pytest.approx(counted.peak, rel=0.03), f"pipeline rank {rank}: {expected.rows()}"
        assert sum(size for _, size in expected.rows()) == expected.total


HOST = {"cpu_offloading_activations": True}
CHUNKS = {"sequence_chunks": 8, "cpu_offloading_attention": True}
ON_HOST: dict[str, tuple[dict[str, Any], int]] = {
    "activations": (HOST, 1),
    "activations-full": (HOST | {"recompute_granularity": "full"}, 1),
    "chunks": ({"sequence_chunks": 8, "cpu_offloading_attention": True}, 1),
    "chunks-full": (
        HOST
        | {"sequence_chunks": 8, "cpu_offloading_attention": True, "recompute_granularity": "full", "ulysses_size": 2},
        2,
    ),
    "chunks-both": (HOST | {"sequence_chunks": 4, "cpu_offloading_attention": True}, 1),
}


@pytest.mark.parametrize("name", ON_HOST)
def test_account_of_the_host(name: str) -> None:
    given, world = ON_HOST[name]
    config = from_values(SMALL | given)
    layout = validate(config, world, "cuda")
    expected, counted = account(config, layout), dry_run.count(config, layout)
    assert expected.total == pytest.approx(counted.peak, rel=0.03), expected.rows()
    assert expected.host == pytest.approx(counted.host, rel=0.03)


def test_zero_shares_states_out() -> None:
    from megasp.data_parallel.memory import state_bytes

    def per_parameter(zero: int, gradient_item: int | None = None) -> float:
        s = state_bytes(8_000_000, 0, 0, 2, 8, 8, zero, gradient_item)
        return (s.parameters + s.masters + s.gradients + s.optimizer) / 8e6

    assert [per_parameter(zero) for zero in range(4)] == [18, 7.5, 4, 2]
    assert per_parameter(1, gradient_item=2) == 5.5, "with bf16 gradients: Llama-3 8B on 8 H100s, 44.27e9 bytes"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model tiny --vocab-size 256 --pipeline-model-parallel-size 2 --global-batch-size 4 --dry-run"
    assert memory.main(flags.split(), "megasp memory") == 0
    said = capsys.readouterr().out
    assert "layout tp1-pp2" in said and "optimizer states" in said and "counted by a dry run" in said
    assert "bytes a token and layer" in said
