"""The account of memory against what the real step allocates, counted exactly on tensors without memory."""

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megasp import dry_run, memory
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.data_parallel.memory import Sharding
from megasp.errors import ConfigError
from megasp.training.memory import account, check_host_memory, writers
from tests.unit.property import sample

TOLERANCE = 0.03
"""Between the account and the count."""

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
FP8 = {"fp8_format": "hybrid"}
MXFP8 = FP8 | {"fp8_recipe": "mxfp8", "ffn_hidden_size": 768}
COMPILE = {"compile": True}
SELECTIVE = {"recompute_granularity": "selective"}
CUDNN = {"attention_backend": "fused", "ffn_hidden_size": 64, "kv_channels": 128}
"""Attention holds most here, so that what its kernel copies shows."""

HOST = {"optimizer_cpu_offload": True}
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
    "cudnn": (CUDNN, 1),
    "cudnn-full-ulysses": (CUDNN | {"ulysses_size": 4, "recompute_granularity": "full"}, 4),
    "cudnn-ring": (CUDNN | {"ring_size": 4}, 4),
    "ring": ({"ring_size": 4}, 4),
    "ring-tiled-full": ({"ring_size": 4, "tiled_mlp": 8, "recompute_granularity": "full"}, 4),
    "tiles-by-budget": (SP | {"activation_tile_mb": 1}, 2),
    "chunks": ({"sequence_chunks": 4}, 1),
    "chunks-fp32": ({"sequence_chunks": 2, "bf16": False}, 1),
    "chunks-full": (SP | {"sequence_chunks": 8, "recompute_granularity": "full", "num_layers": 2}, 2),
    "chunks-tiles": ({"sequence_chunks": 4, "tiled_mlp": 16, "ulysses_size": 2, "num_layers": 2}, 2),
    "u-r-tp": ({"ulysses_size": 2, "ring_size": 2} | SP, 8),
    "zero1": ({"data_parallel_sharding_strategy": "optim", "global_batch_size": 4}, 2),
    "zero2": ({"data_parallel_sharding_strategy": "optim_grads", "global_batch_size": 4}, 2),
    "zero1-once": ({"data_parallel_sharding_strategy": "optim"}, 2),
    "zero3-once": ({"data_parallel_sharding_strategy": "optim_grads_params"}, 2),
    "zero3": ({"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 4}, 2),
    "host": (HOST | {"seq_length": 1024}, 1),
    "host-half": (HOST | {"optimizer_offload_fraction": 0.5, "seq_length": 1024}, 1),
    "host-fp32": (HOST | {"bf16": False, "seq_length": 1024}, 1),
    "host-dp": (HOST | {"global_batch_size": 4, "seq_length": 1024}, 2),
    "host-zero1": (HOST | {"data_parallel_sharding_strategy": "optim", "global_batch_size": 4}, 2),
    "host-zero3": (HOST | {"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 4}, 2),
    "1f1b": ({PP: 2, "global_batch_size": 4}, 2),
    "interleaved": ({PP: 2, "global_batch_size": 4, "num_virtual_stages_per_pipeline_rank": 2}, 2),
    "zb-h1": ({PP: 2, "global_batch_size": 4, "pipeline_schedule": "zb-h1"}, 2),
    "fp8": (FP8, 1),
    "fp8-sp": (FP8 | SP | {"first_last_layers_bf16": True}, 2),
    "fp8-tp": (FP8 | {TP: 2}, 2),
    "fp8-rowwise": (FP8 | SP | {"fp8_recipe": "rowwise"}, 2),
    "fp8-mxfp8": (MXFP8, 1),
    "fp8-mxfp8-sp": (MXFP8 | SP, 2),
    "fp8-blockwise": (MXFP8 | SP | SELECTIVE | {"fp8_recipe": "blockwise", "recompute_modules": ("layernorm",)}, 2),
    "fp8-remade": (FP8 | SP | SELECTIVE | {"recompute_modules": ("layernorm", "mlp_act")}, 2),
    "fp8-tiled": (FP8 | {"tiled_mlp": 8}, 1),
    "fp8-zero3": (FP8 | {"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 4}, 2),
    "fp8-zb-h1": (FP8 | {PP: 2, "global_batch_size": 4, "pipeline_schedule": "zb-h1"}, 2),
    "compiled": (COMPILE, 1),
    "compiled-fp32": (COMPILE | {"bf16": False}, 1),
    "compiled-gpt2": (COMPILE | GPT2 | SP | {"bf16": True}, 2),
    "compiled-tp": (COMPILE | {TP: 2, "squared_relu": True, "swiglu": False, "qk_layernorm": True}, 2),
    "compiled-remade": (COMPILE | SP | SELECTIVE | {"recompute_modules": ("layernorm", "mlp_act")}, 2),
    "compiled-chunks": (COMPILE | {"sequence_chunks": 4}, 1),
    "zbv": ({PP: 2, "global_batch_size": 4, "pipeline_schedule": "zbv"}, 2),
}


def configured(given: dict[str, Any], world: int) -> tuple[Config, Layout]:
    config = from_values(SMALL | given)
    return config, validate(config, world, "cuda")


@pytest.mark.parametrize("name", CASES)
def test_account_is_the_count(name: str) -> None:
    config, layout = configured(*CASES[name])
    for rank in range(layout.pp):
        expected = account(config, layout, rank)
        counted = dry_run.count(config, layout, expected.rank)
        if not layout.zero:  # which gathers weights and makes gradients in the step
            assert expected.static == pytest.approx(counted.built, rel=1e-3), "states"
        assert expected.total == pytest.approx(counted.peak, rel=TOLERANCE), f"pipeline rank {rank}: {expected.rows()}"
        assert sum(size for _, size in expected.rows()) == expected.total
        kept = sum(size for name, size in expected.host.items() if name in ("master weights", "optimizer states"))
        assert kept == pytest.approx(counted.host, rel=0.06), expected.host


AWAY = {"cpu_offloading_activations": True}
CHUNKS = {"sequence_chunks": 8, "cpu_offloading_attention": True}
ON_HOST: dict[str, tuple[dict[str, Any], int]] = {
    "activations": (AWAY, 1),
    "activations-full": (AWAY | {"recompute_granularity": "full"}, 1),
    "chunks": (CHUNKS, 1),
    "chunks-full": (AWAY | CHUNKS | {"recompute_granularity": "full", "ulysses_size": 2}, 2),
    "chunks-both": (AWAY | CHUNKS | {"sequence_chunks": 4}, 1),
}


@pytest.mark.parametrize("name", ON_HOST)
def test_account_of_the_host(name: str) -> None:
    given, world = ON_HOST[name]
    config = from_values(SMALL | given)
    layout = validate(config, world, "cuda")
    expected, counted = account(config, layout), dry_run.count(config, layout)
    assert expected.total == pytest.approx(counted.peak, rel=TOLERANCE), expected.rows()
    assert expected.on_host == pytest.approx(counted.on_host, rel=TOLERANCE), expected.host


WEIGHTS = {"hidden_size": 512, "ffn_hidden_size": 1408, "seq_length": 512, "vocab_size": 2048}
"""Where weights are more than activations."""


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Flags of any kind together, and ranks; not all of them are legal. In bf16: fp32's attention is an estimate."""
    one_of = st.sampled_from
    tp, pp, cp, dp = (draw(one_of(sizes)) for sizes in ((1, 1, 2), (1, 2), (1, 1, 2), (1, 2, 4)))
    zero = draw(one_of(("no_shard", "optim", "optim_grads", "optim_grads_params", "optim_grads_params")))
    schedules = ({}, {"num_virtual_stages_per_pipeline_rank": 2}, {"pipeline_schedule": "zb-h1"})
    recompute = (
        {}, {"recompute_granularity": "full"}, {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "alternate", "recompute_num_layers": 2},
        {"recompute_granularity": "all-but-attention"}, SELECTIVE | {"recompute_modules": ("mlp", "layernorm")},
    )  # fmt: skip
    away = ({}, {}, HOST, HOST | {"cpu_offloading_weights": True}, AWAY)
    others = ({}, {}, FP8, {"tiled_mlp": 4}, {"sequence_chunks": 4}, {"grad_reduce_in_bf16": True})
    flags = draw(one_of((SMALL, GPT2, SMALL | WEIGHTS, SMALL | WEIGHTS, GPT2 | WEIGHTS))) | {"bf16": True}
    flags |= draw(one_of(recompute)) | draw(one_of(others)) | {"data_parallel_sharding_strategy": zero}
    offload = draw(one_of(away))
    if AWAY.items() <= offload.items():
        flags |= {name: SMALL[name] for name in WEIGHTS}  # small activations stay
    flags |= offload | (draw(one_of((*schedules, {"pipeline_schedule": "zbv"}))) if pp > 1 else {})
    flags |= {TP: tp, "sequence_parallel": tp > 1 and draw(st.booleans()), PP: pp, "micro_batch_size": 1}
    flags |= {draw(one_of(("ulysses_size", "ring_size"))): cp} if cp > 1 else {}
    flags |= (
        {"num_distributed_optimizer_instances": 2} if zero != "no_shard" and dp == 4 and draw(st.booleans()) else {}
    )
    return flags | {"global_batch_size": dp * pp * draw(one_of((1, 2)))}, tp * pp * cp * dp


@settings(sample(40), suppress_health_check=list(HealthCheck))
@given(runs())
def test_any_combination(run: tuple[dict[str, Any], int]) -> None:
    """What is legal of random combinations, on the first and the last pipeline rank in turn."""
    try:
        config, layout = configured(*run)
    except ConfigError:
        assume(False)
    expected = account(config, layout, (layout.pp - 1) * (config.num_microbatches(layout) % 2))
    counted = dry_run.count(config, layout, expected.rank, steps=1)
    assert expected.total == pytest.approx(counted.peak, rel=TOLERANCE), f"{layout.name} {run}: {expected.rows()}"
    assert sum(size for _, size in expected.rows()) == expected.total


def test_zero_shares_states_out() -> None:
    def per_parameter(zero: int, summed: int = 4) -> float:
        s = Sharding(2, summed, summed, ranks=8, shards=8, zero=zero, once=False).states(8_000_000)
        return (s.parameters + s.masters + s.gradients + s.optimizer) / 8e6

    assert [per_parameter(zero) for zero in range(4)] == [18, 7.5, 4, 2]
    assert per_parameter(1, summed=2) == 5.5, "with bf16 gradients: Llama-3 8B on 8 H100s, 44.27e9 bytes"


def test_weights_on_the_host() -> None:
    """ZeRO-3 over 8 ranks with all on the host: 16 bytes a parameter there, and on the device a few layers."""
    strategy = {"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 8}
    config, layout = configured(strategy | HOST | {"cpu_offloading_weights": True}, 8)
    all_there, plain = account(config, layout), account(configured(strategy, 8)[0], layout)
    counted = dry_run.count(config, layout, steps=1)
    assert all_there.static == 0 < all_there.peak.gathered
    assert counted.peak == pytest.approx(all_there.total, rel=TOLERANCE) and all_there.total < plain.total
    assert all_there.on_host == pytest.approx(counted.host_passes, rel=TOLERANCE)
    assert all_there.on_host > plain.static + plain.states.gradients, "fp32 weights, gradients and moments"


@pytest.mark.parametrize("given", [{}, AWAY | CHUNKS | {"recompute_granularity": "full", "ulysses_size": 2}])
def test_dry_run_of_weights_on_the_host(given: dict[str, Any]) -> None:
    """Shards, gradients and moments are there, and weights here while a layer is gathered."""
    sharded = {"data_parallel_sharding_strategy": "optim_grads_params", "cpu_offloading_weights": True}
    config, layout = configured(HOST | sharded | given, 2)
    expected, counted = account(config, layout), dry_run.count(config, layout)
    states = expected.host["master weights"] + expected.host["optimizer states"]
    assert counted.built < 1e4 and counted.host == pytest.approx(states, rel=1e-3)
    assert states + expected.host["gradients"] <= 1.001 * counted.on_host <= 1.002 * expected.on_host
    assert expected.total == pytest.approx(counted.peak, rel=0.15), expected.rows()


def test_no_room_on_the_host() -> None:
    config, layout = configured(HOST, 1)
    needed = account(config, layout).on_host
    check_host_memory(config, layout, 2, 2 * needed)
    with pytest.raises(ConfigError, match=r"each of its 2 ranks keeps 0\.\d GB there \(master weights"):
        check_host_memory(config, layout, 2, 2 * needed - 1)
    check_host_memory(configured({}, 1)[0], layout, 2, 0)


def test_no_room_for_the_copy_of_a_checkpoint() -> None:
    """Of eight ranks that hold the same one writes, and with ZeRO-1 each its shard."""
    saving = {"async_save": True, "save": "somewhere", "global_batch_size": 8}
    for more, writing in (({}, 1), ({"data_parallel_sharding_strategy": "optim"}, 8)):
        config, layout = configured(saving | more, 8)
        needed = writing * account(config, layout).host["copy for a checkpoint"]
        assert needed >= 12 * 3_200_000 and writers(layout, 8) == writing
        check_host_memory(config, layout, 8, needed)
        with pytest.raises(ConfigError, match="save without --async-save"):
            check_host_memory(config, layout, 8, needed - 1)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model tiny --vocab-size 256 --pipeline-model-parallel-size 2 --global-batch-size 4 --dry-run"
    assert memory.main(flags.split(), "megasp memory") == 0
    said = capsys.readouterr().out
    assert "layout tp1-pp2" in said and "optimizer states" in said and "counted by a dry run" in said
    assert "bytes a token and layer" in said
