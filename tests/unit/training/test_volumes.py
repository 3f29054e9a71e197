"""What a step sends and computes, in closed form, is what the real step on fake tensors does, to the byte.

Left out are the gradient norm's sum, and with sequence parallelism those of norm weights.
"""

import pytest

from megasp import dry_run
from megasp.config.load import from_values
from megasp.config.presets import PRESETS
from megasp.config.validate import validate

BASE = {
    "bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0, "vocab_size": 8192,
    "global_batch_size": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "ulysses_size": 2,
}  # fmt: skip

CASES = {
    "hybrid ZeRO-1 of interleaved": (
        {"sequence_parallel": True, "num_virtual_stages_per_pipeline_rank": 2, "num_distributed_optimizer_instances": 2}
        | {"data_parallel_sharding_strategy": "optim"}
    ),
    "ZeRO-3 of tiles": (
        {"sequence_parallel": True, "recompute_granularity": "full", "tiled_mlp": 2}
        | {"data_parallel_sharding_strategy": "optim_grads_params"}
    ),
    "ZeRO-2 of a ring": (
        {"ring_size": 2, "recompute_granularity": "all-but-attention", "data_parallel_sharding_strategy": "optim_grads"}
    ),
    "chunks": {"sequence_parallel": True, "sequence_chunks": 4},
    "chunks made again, with tiles": (
        {"sequence_chunks": 2, "tiled_mlp": 8, "recompute_granularity": "full", "global_batch_size": 4}
        | {"sequence_parallel": True, "num_layers": 8}
    ),
    "chunks in groups of layers with ZeRO-3": (
        {"sequence_chunks": 2, "recompute_granularity": "full", "recompute_num_layers": 2, "num_layers": 8}
        | {"sequence_parallel": True, "data_parallel_sharding_strategy": "optim_grads_params"}
    ),
    "uneven groups of layers with ZeRO-3": (
        {"recompute_granularity": "full", "recompute_num_layers": 3, "num_layers": 10, "activation_tile_mb": 1}
        | {"sequence_parallel": True, "data_parallel_sharding_strategy": "optim_grads_params"}
    ),
    "chunks with weights on the host": (
        {"sequence_chunks": 4, "optimizer_cpu_offload": True, "cpu_offloading_weights": True}
        | {"cpu_offloading_attention": True, "data_parallel_sharding_strategy": "optim_grads_params"}
    ),
    "inputs shared out": {"recompute_granularity": "full", "distribute_saved_activations": True},
    "LightSeq, whose ranks compute unlike amounts": ({"ring_size": 2, "cp_comm_type": "lightseq"}),
    "split backwards": (
        {"sequence_parallel": True, "pipeline_schedule": "zb-h1", "recompute_granularity": "selective"}
        | {"recompute_modules": ("mlp", "layernorm")}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name: str) -> None:
    config = from_values(PRESETS["tiny"] | BASE | CASES[name])
    layout = validate(config, 16, "cuda")
    for pipeline_rank in range(2):
        place = dict.fromkeys(("dp_outer", "dp_inner", "ring", "ulysses", "tp"), 0) | {"pp": pipeline_rank}
        count = dry_run.count(config, layout, layout.rank(place), steps=1)
        assert count.volume.flops == count.formula.flops
        left_out = {("pp_tp", "all_reduce")} | ({("tp", "all_reduce")} if config.parallel.sequence_parallel else set())
        sent = {key: size for key, size in count.volume.sent.items() if key not in left_out}
        assert sent == count.formula.sent
