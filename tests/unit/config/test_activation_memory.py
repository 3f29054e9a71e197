"""Rules of recompute, tiling and offloading: each sentence, and layers that recompute."""

from typing import Any

import pytest

from megasp.config import host_offload
from megasp.config.load import from_values
from megasp.config.recompute import Recompute
from megasp.config.tiles import mlp_tiles
from megasp.config.validate import validate
from megasp.errors import ConfigError
from tests.unit.config.validate_cases import BASE, PP, TP

DISTRIBUTED = {"distribute_saved_activations": True, "recompute_granularity": "full", TP: 2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recompute_method": "block"}, "--recompute-method block without --recompute-granularity"),
        ({"recompute_num_layers": 2}, "--recompute-num-layers 2 without"),
        ({"recompute_modules": ("mlp",)}, "--recompute-modules with recompute-granularity None"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 2}, "groups of layers"),
        (
            {
                "recompute_granularity": "selective",
                "recompute_modules": ("core_attn",),
                "ulysses_head_chunks": 2,
                "ulysses_size": 2,
            },
            "exchanges on their way",
        ),
        (DISTRIBUTED | {"recompute_granularity": None}, "recompute-granularity None: inputs of layers"),
        (DISTRIBUTED | {TP: 1}, "tensor-model-parallel-size 1: it shares out"),
        (DISTRIBUTED | {"sequence_parallel": True}, "tensor-model-parallel-size 2 and --sequence-parallel"),
        (DISTRIBUTED | {"hidden_size": 63, "kv_channels": 8}, "hidden-size 63 on tensor-model-parallel-size 2"),
        (DISTRIBUTED | {"cpu_offloading_activations": True}, "go to the host"),
        ({"tiled_mlp": 33}, "--tiled-mlp 33 on 32 positions"),
        ({"tiled_mlp": 2, "recompute_granularity": "selective", "recompute_modules": ("mlp",)}, "keeps its input"),
        ({"tiled_mlp": 2, "pipeline_schedule": "zb-h1", PP: 2}, "put off keep all tiles"),
        ({"cpu_offloading_attention": True}, "without --sequence-chunks"),
        ({"cpu_offloading_attention": True, "sequence_chunks": 2}, "--cpu-offloading-attention on a CPU"),
        ({"sequence_chunks": 2, "ring_size": 2}, "balance their work"),
        ({"sequence_chunks": 3, "ulysses_size": 2}, "use --sequence-chunks 2 or 4"),
        ({"sequence_chunks": 2, "recompute_granularity": "all-but-attention"}, "gave as it is"),
        ({"sequence_chunks": 2, "pipeline_schedule": "zb-h1", PP: 2}, "put off keep all chunks"),
        ({"cpu_offloading_num_layers": 1}, "nothing is offloaded"),
        ({"cpu_offloading_activations": True}, "on a CPU"),
        ({"cpu_offloading_activations": True, "recompute_granularity": "all-but-attention"}, "on the device"),
    ],
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        world = max(given.get(name, 1) for name in (PP, TP, "ulysses_size", "ring_size"))
        validate(from_values(BASE | given), world)


@pytest.mark.parametrize(
    ("given", "ranks", "tiles"),
    [
        ({}, 1, 1),
        ({"activation_tile_mb": 8}, 1, 12),  # 8192 tokens x (gate, up, product) x 1024 x 4 bytes = 96 MB
        ({"activation_tile_mb": 8, "bf16": True}, 1, 6),
        ({"activation_tile_mb": 8, "tiled_mlp": 5}, 1, 5),
        ({"activation_tile_mb": 8, "ulysses_size": 2}, 2, 6),
        ({"activation_tile_mb": 8, TP: 2, "sequence_parallel": True}, 2, 6),
        ({"activation_tile_mb": 1000}, 1, 1),
    ],
)
def test_tiles_by_a_budget(given: dict[str, Any], ranks: int, tiles: int) -> None:
    config = from_values(BASE | {"seq_length": 8192, "ffn_hidden_size": 1024, "swiglu": True} | given)
    assert mlp_tiles(config, validate(config, ranks)) == tiles


ZERO3 = {"data_parallel_sharding_strategy": "optim_grads_params"}
ON_HOST = {"optimizer_cpu_offload": True}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction 0.5 without --optimizer-cpu-offload"),
        ({"cpu_offloading_weights": True}, "with --data-parallel-sharding-strategy no_shard"),
        (ZERO3 | {"cpu_offloading_weights": True}, "runs where the weight is"),
        (ZERO3 | ON_HOST | {"cpu_offloading_weights": True, "optimizer_offload_fraction": 0.5}, "where the weight is"),
        (ON_HOST, "on a CPU"),
    ],
)
def test_host_offload_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(from_values(BASE | given), 2)


def test_packages_step_on_the_device() -> None:
    config = from_values(BASE | ON_HOST | {"optimizer_backend": "apex"})
    with pytest.raises(ConfigError, match="--optimizer-backend apex with all of the optimizer on the host"):
        host_offload.check(config, "cuda")


def test_offload_on_a_gpu_passes() -> None:
    validate(from_values(BASE | {"cpu_offloading_activations": True}), 1, "cuda")
    validate(from_values(BASE | ON_HOST | {"optimizer_offload_fraction": 0.5}), 1, "cuda")
    validate(from_values(BASE | ON_HOST | ZERO3 | {"cpu_offloading_weights": True}), 1, "cuda")


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (Recompute(), "0 1 2 3 4"),
        (Recompute("full"), "0* 1* 2* 3* 4*"),
        (Recompute("full", num_layers=2), "01* 23* 4*"),
        (Recompute("full", "block", 2), "0* 1* 2 3 4"),
        (Recompute("selective", "alternate", 2), "0* 1 2* 3 4*"),
    ],
)
def test_groups(recompute: Recompute, expected: str) -> None:
    said = " ".join("".join(map(str, group)) + "*" * again for group, again in recompute.groups(5))
    assert said == expected
