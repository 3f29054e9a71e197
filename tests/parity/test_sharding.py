"""Sharded weights (ZeRO-1 to -3, hybrid) train as one process does: fp64 with every kind of split; bit for bit as
replicated weights where both add in one order; what is sent and held; resuming in another stage."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.validate import validate
from megasp.data_parallel import WeightShards
from megasp.parameters import placed
from megasp.training.build import Training, build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import evaluate, train_step
from tests.parity.test_pipeline import Case, compare, config_of, options
from tests.ranks import run_ranks

TOLERANCE = 1e-12

LAYOUTS: list[Case] = [
    ("dp4-zero1", {}),
    ("dp4-dpo2-zero2", {}),
    ("dp4-zero3", {}),
    ("u2-dp2-zero3", {}),
    ("dp4-dpo2-zero1", {}),
    ("tp2-dp2-zero2", {}),
    ("pp2-dp2-zero1", {"pipeline_schedule": "zb-h1"}),
    ("tp2-dp2-zero3", {}),
    ("pp2-dp2-zero2", {}),
    ("pp2-dp2-zero3", {"pipeline_schedule": "zbv"}),
    ("dp4-zero2", {}),
    ("dp4-dpo2-zero3", {}),
    ("r2-dp2-zero1", {}),
    ("u4-zero2", {}),
    ("tp2-dp2-zero1", {}),
    ("pp2-dp2-zero3", {"pipeline_model_parallel_layout": "E|tt|tt|L"}),
]
COUNT = 9
"""Of the first ones, by themselves and with each kind of split, in the quick suite."""


def test_same_training(tmp_path: Path) -> None:
    """Tied and untied, with and without sequence parallelism and recompute, in turn; gradients are clipped."""
    small = {"num_layers": 4, "clip_grad": 0.1}
    cases = [(layout, options(i) | small | flags) for i, (layout, flags) in enumerate(LAYOUTS)]
    compare(cases if os.environ.get("MEGASP_FULL_MATRIX") else cases[:COUNT], tmp_path, TOLERANCE)


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    """32 rows over three ranks; norms of 4 rows, and query heads, of which the last rank has none."""
    flags = {"num_layers": 2, "global_batch_size": 12, "qk_layernorm": True}
    compare([("dp3-zero1", flags), ("dp3-zero3", flags)], tmp_path, TOLERANCE)


def test_a_layout_names_the_stage_or_leaves_it_to_the_flags() -> None:
    for layout, flags, name in (
        ("dp4-dpo2-zero2", {}, "tp1-pp1-u1-r1-dp4-dpo2-zero2"),
        ("dp2", {"use_distributed_optimizer": True}, "tp1-pp1-u1-r1-dp2-zero1"),
        ("dp2-zero3", {"data_parallel_sharding_strategy": "optim"}, "tp1-pp1-u1-r1-dp2-zero3"),
    ):
        assert validate(config_of(layout, flags), Layout.parse(layout).world_size).name == name


def started(layout: str, flags: dict[str, Any], dtype: torch.dtype) -> Training:
    state = parallel_state.build(Layout.parse(layout), torch.device("cpu"))
    return build(config_of(layout, {"num_layers": 2, "clip_grad": 0.0} | flags), state, dtype)


def trained(layout: str, flags: dict[str, Any], dtype: torch.dtype) -> tuple[Training, list[float], list[float]]:
    """Three steps with an evaluation between; the training, losses, and gradient norms."""
    training = started(layout, flags, dtype)
    config, state, losses, norms = training.config, training.state, [], []
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        for step in range(3):
            result = train_step(training, loader.step(), 1e-3)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if step == 1:
                losses.append(evaluate(training, [loader.read(8)]))
    return training, losses, norms


def whole(training: Training) -> dict[str, Tensor]:
    """Every canonical tensor of the model that this rank holds whole."""
    tensors = {}
    for master in training.replicas.masters:
        for piece, local in placed(master.pieces):  # type: ignore[attr-defined]
            tensors[piece.name] = master.data[local.slices]
    return tensors


def _as_replicas(layout: str, flags: dict[str, Any], dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    replicated, losses, norms = trained(layout.split("-zero")[0], flags, dtype)
    sharded, same_losses, same_norms = trained(layout, flags, dtype)
    assert isinstance(sharded.replicas, WeightShards) and losses == same_losses
    assert norms == pytest.approx(same_norms, rel=1e-6), "those of vectors are rounded to fp32 by shard"
    reference = whole(replicated)
    for master in sharded.replicas.masters:
        for piece, local in placed(master.pieces):  # type: ignore[attr-defined]
            assert torch.equal(master.data[local.slices], reference[piece.name][piece.box.slices]), piece.name


@pytest.mark.parametrize(
    ("layout", "flags", "dtype"),
    [
        ("dp2-zero1", {}, "bfloat16"),
        ("dp2-zero1", {"bf16": True, "grad_reduce_in_bf16": True}, "bfloat16"),
        ("u2-zero1", {"fp16": True, "initial_loss_scale": 1024.0}, "float16"),
        ("dp2-zero1", {"recompute_granularity": "full", "untie_embeddings_and_output_weights": True}, "float32"),
        ("pp2-dp2-zero1", {"pipeline_schedule": "zb-h1"}, "bfloat16"),
        ("pp2-dp2-zero3", {"pipeline_schedule": "zbv", "num_layers": 4}, "bfloat16"),
    ],
)
def test_bitwise_as_replicas(layout: str, flags: dict[str, Any], dtype: str) -> None:
    """Two ranks have one order of adding: losses, validation loss and weights are the same bits. Deferred weight
    gradients are added in fp32, too."""
    run_ranks(_as_replicas, Layout.parse(layout).world_size, layout, flags, dtype)


def _sent_and_held(layout: str, bf16_gradients: bool) -> tuple[dict[str, float], float, dict[str, int]]:
    """Of a step, in units of the model's size: bytes sent over dp_cp, elements held, bytes sent over dp_outer."""
    flags = {"bf16": True, "grad_reduce_in_bf16": bf16_gradients, "untie_embeddings_and_output_weights": True}
    training = started(layout, flags, torch.bfloat16)
    count = sum(p.numel() for p in training.model.parameters())  # of DTensors: the whole
    assert isinstance(training.replicas, WeightShards)
    config, inner = training.config, training.replicas.shard_axis
    with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
        batches = loader.step()
        train_step(training, batches, 1e-3)
    sent = {operation: bytes_ / count / len(batches) for operation, bytes_ in inner.traffic.bytes_sent.items()}
    return sent, sum(m.numel() for m in training.replicas.masters) / count, training.replicas.outer.traffic.calls


@pytest.mark.parametrize(
    ("layout", "bf16", "gathered", "reduced", "outer"),
    [
        # gathers of 2 bytes, reductions of 4 or 2, half of each leaves a rank of two; by microbatch, of which there are
        # 4 (2 with dp4). ZeRO-3 gathers twice but for embedding and head.
        ("dp2-zero1", False, (1 / 4, 1 / 4), 4 / 2 / 4, 0),
        ("dp2-zero1", True, (1 / 4, 1 / 4), 2 / 2 / 4, 0),
        ("dp2-zero2", False, (1 / 4, 1 / 4), 4 / 2, 0),
        ("dp2-zero3", False, (1, 2), 4 / 2, 0),
        ("dp4-dpo2-zero2", False, (1 / 2, 1 / 2), 4 / 2, 5),
    ],
)
def test_sent_and_held(layout: str, bf16: bool, gathered: tuple[float, float], reduced: float, outer: int) -> None:
    """Groups: embedding, two blocks, norm, head. WeightShards of replicas are summed once a step."""
    for sent, held, calls in run_ranks(_sent_and_held, Layout.parse(layout).world_size, layout, bf16):
        assert held == 0.5 and sent["reduce_scatter"] == reduced, sent
        assert gathered[0] <= sent["all_gather"] <= gathered[1], sent
        assert calls.get("all_reduce", 0) == outer


RECOMPUTES: list[dict[str, Any]] = [
    {},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "full", "recompute_num_layers": 2},
    {"recompute_granularity": "all-but-attention"},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp", "layernorm")},
]


def _gathers(layers: int) -> list[int]:
    """Of a step of one microbatch, with each recompute."""
    found = []
    for recompute in RECOMPUTES:
        flags = {"num_layers": layers, "untie_embeddings_and_output_weights": True, "global_batch_size": 2}
        training = started("dp2-zero3", flags | recompute, torch.bfloat16)
        assert isinstance(training.replicas, WeightShards)
        with build_loader(
            training.config, training.state, training.shards, build_datasets(training.config).train
        ) as loader:
            train_step(training, loader.step(), 1e-3)
        found.append(training.replicas.shard_axis.traffic.calls["all_gather"])
    return found


def test_recompute_gathers_nothing_again() -> None:
    """Embedding and head once, blocks and the final norm once forward and once backward: a block that is made again
    finds the weights that its backward has gathered."""
    assert run_ranks(_gathers, 2, 4)[0] == [2 + 2 * (4 + 1)] * len(RECOMPUTES)
