"""Master weights, moments and the step on the host: the same training bit for bit, in any layout; clipping, steps that
overflow, checkpoints between offloaded and plain runs, saving in the background."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import parallel_state
from megasp.config.host_offload import HostOffloadConfig
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data_parallel import WeightShards, on_host
from megasp.parallel_state import ParallelState
from megasp.parameters import placed
from megasp.training import host_optimizer, resume
from megasp.training.build import Training, build
from megasp.training.datasets import build_datasets, build_loader, phase_of
from megasp.training.resume import Progress
from megasp.training.saving import Checkpoints
from megasp.training.step import accumulate_gradients, apply_gradients, train_step
from megasp.verify import Worst, _difference, _record
from tests.parity.test_pipeline import config_of
from tests.parity.test_sharding import TOLERANCE
from tests.ranks import run_ranks

PLAIN = HostOffloadConfig()
AWAY = HostOffloadConfig(optimizer_cpu_offload=True)
ALL = HostOffloadConfig(optimizer_cpu_offload=True, cpu_offloading_weights=True)
HALF = HostOffloadConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5)
SMALL = {"num_layers": 2, "clip_grad": 0.1}


def started(layout: str, flags: dict[str, Any], offload: HostOffloadConfig, dtype: str = "bfloat16") -> Training:
    """Small buckets, so that there are several; the rules would refuse offloading on a CPU."""
    host_optimizer.BUCKET_ELEMENTS = 1000
    config = dataclasses.replace(config_of(layout, SMALL | flags), offload=offload)
    alone = layout == "tp1"
    state = ParallelState.single() if alone else parallel_state.build(Layout.parse(layout), torch.device("cpu"))
    return build(config, state, getattr(torch, dtype))


def trained(training: Training, steps: int = 3) -> list[tuple[float, float]]:
    """Losses and gradient norms."""
    config, found = training.config, []
    with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
        for _ in range(steps):
            result = train_step(training, loader.step(), 1e-2)
            found.append((result.loss, result.grad_norm))
    return found


def state(training: Training) -> list[Tensor]:
    """Masters and moments, by canonical name."""
    named = {}
    for index, master in enumerate(training.optimizer.masters):
        kept = training.optimizer.state[master]
        for piece, local in placed(master.pieces):  # type: ignore[attr-defined]
            tensors = (master.data, kept["exp_avg"], kept["exp_avg_sq"])
            named[f"{piece.name} {piece.box} {index}"] = [tensor[local.slices] for tensor in tensors]
    return [tensor for name in sorted(named) for tensor in named[name]]


def same(a: Training, b: Training) -> bool:
    weights = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(map(torch.equal, state(a), state(b))) and all(
        torch.equal(getattr(x, "_local_tensor", x), getattr(y, "_local_tensor", y)) for x, y in weights
    )


def _same(cases: list[tuple[str, dict[str, Any], HostOffloadConfig, str]]) -> None:
    for layout, flags, offload, dtype in cases:
        plain, away = started(layout, flags, PLAIN, dtype), started(layout, flags, offload, dtype)
        masters = zip(away.optimizer.masters, away.replicas.masters, strict=True)
        held = [master is not weight for master, weight in masters]
        if offload == ALL:
            assert not any(held) and isinstance(away.replicas, WeightShards)
        else:
            assert sum(held) == (len(held) if offload == AWAY else sum(on_host(away.replicas.masters, 0.5))) > 0
            assert len(away.optimizer._buckets) > 1
        assert trained(plain) == trained(away), (layout, flags)
        assert same(plain, away), (layout, flags)


def test_alone() -> None:
    _same(
        [
            ("tp1", {}, AWAY, "bfloat16"),
            ("tp1", {"grad_reduce_in_bf16": True, "bf16": True}, AWAY, "bfloat16"),
            ("tp1", {"weight_decay": 0.3}, HALF, "bfloat16"),
            ("tp1", {"clip_grad": 0.0}, AWAY, "float32"),
        ]
    )


def test_replicas_and_shards() -> None:
    cases = [
        ("dp2", {}, AWAY, "bfloat16"),
        ("dp2-zero1", {}, AWAY, "bfloat16"),
        ("dp2-zero2", {}, HALF, "float32"),
        ("dp2-zero3", {}, AWAY, "bfloat16"),
        ("tp2", {"sequence_parallel": True}, AWAY, "bfloat16"),
        ("pp2", {"pipeline_schedule": "zb-h1"}, AWAY, "bfloat16"),
        ("dp2-zero3", {}, ALL, "bfloat16"),
    ]
    run_ranks(_same, 2, cases)


ALL_CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp2-dp2-zero3", {"sequence_parallel": True, "recompute_granularity": "full"}),
    ("pp2-dp2-zero3", {"pipeline_schedule": "zbv", "num_layers": 4}),
    ("dp4-dpo2-zero3", {"untie_embeddings_and_output_weights": True}),
    ("tp2-pp2-zero3", {"sequence_parallel": True}),
]
"""With several microbatches, partial and tied gradients; the last has nobody to share with."""


def _differences(cases: list[tuple[Config, Layout, Path]]) -> list[Worst]:
    return [_difference(config, layout, 3, "fp64", reference) for config, layout, reference in cases]


def test_all_on_the_host_is_as_one_process(tmp_path: Path) -> None:
    """Weights, gradients and optimizer there, against plain weights in one process: fp64."""
    prepared = []
    for number, (layout, flags) in enumerate(ALL_CASES):
        run_ranks(_record, 1, config_of("tp1", SMALL | flags), 3, "fp64", reference := tmp_path / f"{number}.pt")
        config = dataclasses.replace(config_of(layout, SMALL | flags), offload=ALL)
        prepared.append((config, Layout.parse(layout), reference))
    for worsts in run_ranks(_differences, 4, prepared):
        for (layout, _), worst in zip(ALL_CASES, worsts, strict=True):
            assert worst.overall <= TOLERANCE, (layout, worst)


def _all_alone(folder: Path) -> None:
    """One rank, ZeRO-3: what it saves is what a plain run goes on from, and the other way round."""
    flags = {"save": str(folder), "load": str(folder)}
    begun = started("dp1-zero3", flags, ALL)
    trained(begun, 2)
    resume.save(begun, Progress(2, 16, 100), [phase_of(begun.config, begun.state.layout)])
    plain, again = started("dp1", flags, PLAIN), started("dp1-zero3", flags, ALL)
    for training in (plain, again):
        resume.resume(training, resume.find(training.config, training.state))
        assert all(map(torch.equal, state(begun), state(training)))
    assert trained(begun, 1) == trained(again, 1) == trained(plain, 1)
    assert all(map(torch.equal, state(begun), state(plain))) and all(map(torch.equal, state(begun), state(again)))


def test_all_on_the_host_of_one_rank(tmp_path: Path) -> None:
    run_ranks(_all_alone, 1, tmp_path)


def test_overflow_changes_nothing() -> None:
    training = started("tp1", {"fp16": True, "initial_loss_scale": 1024.0, "hysteresis": 1}, AWAY, "float16")
    trained(training, 1)
    before = [x.clone() for x in [*state(training), *training.model.parameters()]]
    with build_loader(
        training.config, training.state, training.shards, build_datasets(training.config).train
    ) as loader:
        accumulate_gradients(training, loader.step())
    training.replicas.masters[0].grad[0, 0] = torch.inf  # type: ignore[index]
    apply_gradients(training, 1e-2)
    assert training.loss_scale.scale == 512
    assert all(map(torch.equal, before, [*state(training), *training.model.parameters()]))
    assert all(weight.grad is None for weight in training.replicas.masters), "the bad gradient is dropped"


@pytest.mark.parametrize(("first", "second"), [(AWAY, PLAIN), (PLAIN, HALF)])
def test_checkpoints(first: HostOffloadConfig, second: HostOffloadConfig, tmp_path: Path) -> None:
    """A run goes on with and without offloading; the weights on the device are the loaded ones at once."""
    begun = started("tp1", {"save": str(tmp_path)}, first)
    trained(begun, 2)
    resume.save(begun, Progress(2, 16, 100), [phase_of(begun.config, begun.state.layout)])
    again = started("tp1", {"load": str(tmp_path)}, second)
    assert resume.resume(again, resume.find(again.config, again.state)).step == 2 and same(begun, again)
    assert trained(begun, 1) == trained(again, 1) and same(begun, again)


def test_background_save_is_of_its_own_step(tmp_path: Path) -> None:
    """The copy of the masters on the host waits for nobody, but the next step waits for it."""
    away = started("tp1", {"save": str(tmp_path), "async_save": True, "save_interval": 1}, AWAY)
    phases = [phase_of(away.config, away.state.layout)]
    trained(away, 1)
    expected = [x.clone() for x in state(away)]
    with Checkpoints(away, phases, 0) as saves:
        saves.after_step(Progress(1, 8, 50), last=False)
        trained(away, 2)
    loaded = started("tp1", {"load": str(tmp_path)}, AWAY)
    resume.resume(loaded, resume.find(loaded.config, loaded.state))
    assert all(map(torch.equal, expected, state(loaded)))


def test_which_weights_go() -> None:
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (10, 20, 30, 40)]
    for share, there in ((0.0, 0), (0.05, 1), (0.1, 1), (0.3, 2), (0.31, 3), (1.0, 4)):
        assert sum(on_host(weights, share)) == there
