"""What makes a dry run fast changes nothing that it counts."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch

from megasp import dry_run
from megasp.config.load import from_values
from megasp.config.presets import PRESETS
from megasp.config.validate import validate
from megasp.dry_run import shape_cache

BASE = PRESETS["tiny"] | {
    "bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0, "vocab_size": 8192,
    "global_batch_size": 2, "num_layers": 2, "seq_length": 4096,
}  # fmt: skip
ZERO3 = {"data_parallel_sharding_strategy": "optim_grads_params"}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "chunks": ({"sequence_chunks": 8, "recompute_granularity": "full", "activation_tile_mb": 1}, 1),
    "chunks on the host": (
        ZERO3
        | {"sequence_chunks": 8, "cpu_offloading_attention": True, "cpu_offloading_activations": True}
        | {"optimizer_cpu_offload": True, "cpu_offloading_weights": True, "ulysses_size": 2},
        2,
    ),
    "ring": (ZERO3 | {"ring_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 8),
    "fp8 and offload": ({"fp8_format": "hybrid", "optimizer_cpu_offload": True, "tiled_mlp": 4}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_shortcuts_count_the_same(name: str) -> None:
    given, world = CASES[name]
    config = from_values(BASE | given)
    layout = validate(config, world, "cuda")

    def run(cache: shape_cache.ShapeCache, func: Any, args: Any, kwargs: Any) -> shape_cache.Answer:
        out = func(*args, **kwargs)
        return shape_cache.Answer(out, (out, args, kwargs))

    fast = dry_run.count(config, layout)
    with (
        mock.patch.object(shape_cache.ShapeCache, "run", run),
        mock.patch.object(dry_run.Tracker, "once", lambda tracker, key, function: function()),
    ):
        slow = dry_run.count(config, layout)
    assert dataclasses.asdict(fast) == dataclasses.asdict(slow)


def test_operators_return_what_they_would() -> None:
    """In place, new, a view, several, the same shapes with numbers of another kind."""
    with dry_run.fake_tensors() as tracker:
        for _ in range(2):
            x = torch.ones(4, 6)
            assert x.add_(1) is x
            assert (x[1:3].t() + 1).shape == (6, 2)
            assert (x > 0).dtype == torch.bool
            assert [part.shape for part in x.split([1, 3])] == [(1, 6), (3, 6)]
            values, places = x.max(1)
            assert (values.shape, places.dtype) == ((4,), torch.int64)
            whole = torch.ones(3, dtype=torch.int64)
            assert ((whole + 1).dtype, (whole + 1.0).dtype) == (torch.int64, torch.float32)
            assert x.new_empty(2, 2).untyped_storage().nbytes() == 16
            y = torch.ones(2, 3)
            y.resize_(4, 3)
            y.unsqueeze_(0)
            assert y.shape == (1, 4, 3)
        live = tracker.live
        with tracker.placed(on_host=True):
            there = torch.ones(10)
        made = there * 2
        assert (tracker.live, tracker.host) == (live, 64 + 40) and tracker.of_host(made)
