"""Any pipeline trains as one process does: losses, gradients by name, weights after steps, evaluation, checkpoints."""

import dataclasses
import itertools
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

from megasp import checkpoints, parallel_state
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.parallel_state import ParallelState
from megasp.pipeline.schedules import schedule
from megasp.training import resume
from megasp.training.build import Training, build
from megasp.training.datasets import build_datasets, build_loader, phase_of
from megasp.training.pretrain import pretrain
from megasp.training.resume import Progress
from megasp.training.step import evaluate, train_step
from megasp.verify import DEFAULTS, TOLERANCES, Worst, _difference, _record, in_layout
from tests.ranks import run_ranks

SMALL = DEFAULTS | {
    "num_layers": 8, "hidden_size": 32, "ffn_hidden_size": 32, "vocab_size": 64, "make_vocab_size_divisible_by": 16,
    "seq_length": 16, "max_position_embeddings": 16,
}  # fmt: skip
STEPS = 2
"""The first begins from the initial weights, the second from moments that are not zero, too."""
SCHEDULES = (
    {"pipeline_schedule": "gpipe"},
    {"num_virtual_stages_per_pipeline_rank": 2},
    {"pipeline_schedule": "zb-h1"},
    {"pipeline_schedule": "zbv"},
)
Case = tuple[str, dict[str, object]]


def config_of(layout: str, flags: dict[str, object]) -> Config:
    made = in_layout(from_values(SMALL | flags), Layout.parse(layout))
    validate(made, Layout.parse(layout).world_size)
    return made


def _differences(cases: list[tuple[Config, Layout, Path]]) -> list[Worst]:
    """Several layouts of the same world size, one after another on the same ranks."""
    return [_difference(config, layout, STEPS, "fp64", reference) for config, layout, reference in cases]


def compare(cases: list[Case], folder: Path, tolerance: float = TOLERANCES["fp64"]) -> None:
    """Each layout with flags against one process with the flags that do not concern the pipeline."""
    prepared, world_size = [], Layout.parse(cases[0][0]).world_size
    references: dict[Config, Path] = {}
    for layout, flags in cases:
        alone = config_of("tp1", flags)
        if alone not in references:
            references[alone] = folder / f"{len(references)}.pt"
            run_ranks(_record, 1, alone, STEPS, "fp64", references[alone])
        prepared.append((config_of(layout, flags), Layout.parse(layout), references[alone]))
    for worsts in run_ranks(_differences, world_size, prepared, timeout=500):
        for (layout, flags), worst in zip(cases, worsts, strict=True):
            assert worst.overall <= tolerance, (layout, flags, worst)


def sample(cases: list[Case], count: int, seed: int = 4) -> list[Case]:
    """Some of the cases; all of them with MEGASP_FULL_MATRIX (`tests/run.sh --full`)."""
    return cases if os.environ.get("MEGASP_FULL_MATRIX") else random.Random(seed).sample(cases, count)


def options(index: int) -> dict[str, object]:
    """What differs from case to case: tied or not, sequence parallelism, recompute."""
    return {
        "untie_embeddings_and_output_weights": index % 2 == 1,
        "sequence_parallel": index % 3 != 0,
        "recompute_granularity": "full" if index % 4 == 3 else None,
    }


def factorisations(world_size: int) -> list[str]:
    sizes = [n for n in (1, 2, 4, 8) if world_size % n == 0]
    fitting = [s for s in itertools.product(sizes, repeat=4) if math.prod(s) == world_size and s[1] > 1]
    return [f"tp{tp}-pp{pp}-u{u}-dp{dp}" for tp, pp, u, dp in fitting]


def test_one_f_one_b_on_factorisations_of_8(tmp_path: Path) -> None:
    compare(sample([(layout, options(i)) for i, layout in enumerate(factorisations(8))], 3), tmp_path)


@pytest.mark.parametrize("flags", SCHEDULES, ids=lambda flags: "-".join(map(str, flags.values())))
def test_schedules(flags: dict[str, object], tmp_path: Path) -> None:
    """Each schedule on the four-rank layouts; tied and untied, with and without recompute."""
    layouts = ("pp4", "tp2-pp2", "pp2-dp2", "pp2-u2")
    compare(sample([(layout, options(i + 2) | flags) for i, layout in enumerate(layouts)], 3), tmp_path)


def test_uneven_layout_string(tmp_path: Path) -> None:
    """Stages without layers, at both ends."""
    compare([("pp4", {"pipeline_model_parallel_layout": "E|t*5|ttt|L"})], tmp_path)


def _started(layout: str, flags: dict[str, object]) -> Training:
    return build(config_of(layout, flags), parallel_state.build(Layout.parse(layout), torch.device("cpu")))


def _validation_loss(training: Training) -> float:
    config, state = training.config, training.state
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        return evaluate(training, (loader.read(8 * step) for step in range(2)))


SPLITS: list[Case] = [
    ("pp4", {}),
    ("tp2-pp2", {"pipeline_schedule": "zbv", "sequence_parallel": True}),
    ("pp2-dp2", {"pipeline_model_parallel_layout": "Et|t*5|tt|L"}),
    ("dp4-zero3", {}),
    ("pp2-dp2-zero1", {"pipeline_schedule": "zb-h1"}),
    ("tp2-dp2-zero2", {"sequence_parallel": True}),
    ("dp4-dpo2-zero3", {}),
]


def _through_splits(folder: str) -> None:
    """Train a step in one split, then load and save in each other one; evaluation agrees on the way."""
    losses, root = [], Path(folder, "0")
    for index, (layout, flags) in enumerate([*SPLITS, SPLITS[0]]):
        training = _started(layout, flags)
        data = build_datasets(training.config).train
        if index == 0:
            with build_loader(training.config, training.state, training.shards, data) as loader:
                train_step(training, loader.step(), 1e-3)
        else:
            checkpoints.load(root, resume.shards(training, optimizer=True))
            root = Path(folder, str(index))
        options = dataclasses.replace(training.config.checkpoint, save=str(root))
        training.config = dataclasses.replace(training.config, checkpoint=options)
        resume.save(training, Progress(1), [phase_of(training.config, training.state.layout)])
        losses.append(_validation_loss(training))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_any_split_loads_any_other(tmp_path: Path) -> None:
    """Model and optimizer, bit for bit."""
    run_ranks(_through_splits, 4, str(tmp_path), timeout=300)
    read = []
    for index in range(len(SPLITS) + 1):
        whole = resume.shards(build(config_of("tp1", {}), ParallelState.single()), optimizer=True)
        checkpoints.load(tmp_path / str(index), whole)
        read.append({(shard.kind, shard.pieces[0].name): shard.tensor.clone() for shard in whole})
    assert any(
        name == "embedding.weight" and values.any() for (kind, name), values in read[0].items() if kind != "model"
    )
    for other in read[1:]:
        assert all(torch.equal(values, other[key]) for key, values in read[0].items())


def _pretrain(folder: str, steps: int) -> None:
    flags = {"pipeline_schedule": "zb-h1", "eval_iters": 1, "eval_interval": 2, "save": folder, "load": folder}
    config = config_of("pp2", flags | {"train_iters": 4, "exit_interval": steps})
    pretrain(build(config, parallel_state.build(Layout.parse("pp2"), torch.device("cpu"))))


def test_a_resumed_pipeline_is_unbroken(tmp_path: Path) -> None:
    """Losses, gradient norms and validation losses of 2 + 2 steps are those of 4, to the last bit."""
    found = []
    for name, parts in (("whole", [4]), ("parts", [2, 4])):
        for steps in parts:
            run_ranks(_pretrain, 2, str(tmp_path / name), steps)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        kept = ("step", "loss", "grad_norm", "validation_loss")
        found.append([[record.get(key) for key in kept] for record in map(json.loads, lines)])
    assert found[0] == found[1] and len(found[0]) == 6


def _sent(flags: dict[str, object]) -> dict[str, int]:
    training = _started("pp2", flags)
    with build_loader(
        training.config, training.state, training.shards, build_datasets(training.config).train
    ) as loader:
        training.pipeline.train(loader.step(), 1.0)
    return training.state.pp.traffic.bytes_sent


def test_bytes_sent() -> None:
    """A rank sends the residual stream of a microbatch once for each of its stages' neighbours elsewhere."""
    each = 8 * 16 * 32 * 4  # microbatches, positions, features, bytes
    assert run_ranks(_sent, 2, {}) == [{"send": each}, {"send": each}]
    assert run_ranks(_sent, 2, {"num_virtual_stages_per_pipeline_rank": 2}) == [{"send": 3 * each}, {"send": 3 * each}]


def _traced(file: str) -> None:
    config = config_of("pp2", {"pipeline_schedule": "zbv", "eval_iters": 0, "train_iters": 2, "trace": file})
    pretrain(build(config, parallel_state.build(Layout.parse("pp2"), torch.device("cpu"))))


def test_trace_is_the_schedule(tmp_path: Path) -> None:
    """Each rank ran its list in its order, and the simulator's times stand beside."""
    run_ranks(_traced, 2, str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    for process, (rank, row) in itertools.product((0, 1), enumerate(schedule("zbv", 2, 8, 2).rows)):
        lane = sorted((e["ts"], e["name"]) for e in events if (e["pid"], e["tid"]) == (process, rank))
        assert [name for _, name in lane] == list(map(str, row))
