"""Conversion from Megatron-LM, against megatron-core itself: it writes the checkpoints, and trains on beside us."""

import argparse
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megasp.checkpoints import Shard, load
from megasp.checkpoints.megatron.conversion import Converted, from_megatron
from megasp.checkpoints.megatron.torch_files import Record, read_pickle, read_torch
from megasp.cli import main
from megasp.errors import CheckpointError
from megasp.model import GPTModel
from tests.ranks import run_ranks
from tests.unit.checkpoints.megatron_ranks import CASES, SAVED_AT, STEPS, Case, probe, write_all, write_corpus

pytest.importorskip("megatron.core")

BY_NAME = {case.name: case for case in CASES}
WHOLE = [case for case in CASES if case.name != "buckets"]
"""Cases whose optimizer converts."""


class Written:
    """The checkpoints in `root`, and what each rank returned of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ranks = run_ranks(write_all, 2, root, write_corpus(root / "corpus"), tuple(BY_NAME))

    def of(self, case: Case) -> list[dict[str, Any]]:
        return [rank[case.name] for rank in self.ranks]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def converted(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """Each checkpoint by its directory's name, converted once."""
    done: dict[str, Converted] = {}

    def convert(name: str) -> Converted:
        if name not in done:
            done[name] = from_megatron(written.root / name, tmp_path_factory.mktemp("ours") / "ckpt")
        return done[name]

    return convert


def tensors(done: Converted) -> dict[str, Tensor]:
    return load_file(done.directory / "model.safetensors")


def expected(written: Written, case: Case) -> dict[str, Tensor]:
    """The canonical tensors, put together by hand from what each rank held."""
    ranks = [rank["state"] for rank in written.of(case)]
    found = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        held = [{name: torch.from_numpy(array) for name, array in rank[kind].items()} for rank in ranks]
        if case.pp > 1:  # two stages of a layer each
            second = {name.replace("layers.0", "layers.1"): tensor for name, tensor in held[1].items()}
            held = [held[0] | {name: t for name, t in second.items() if name != "output_layer.weight"}]
        for name in held[0]:
            parts = [rank[name] for rank in (held if case.tp > 1 else held[:1])]
            found |= {f"{kind}/{ours}": tensor for ours, tensor in _canonical(name, parts, case)}
    return found


def _canonical(name: str, parts: list[Tensor], case: Case) -> list[tuple[str, Tensor]]:
    first = name.split(".weight")[0].split(".bias")[0]
    last = name[len(first) :]
    layer, _, module = first.removeprefix("decoder.").partition(".")[2].partition(".")
    prefix = f"layers.{layer}"
    if first == "embedding.word_embeddings":
        return [("embedding.weight", torch.cat(parts))]
    if first == "output_layer":
        return [("head.weight", torch.cat(parts))]
    if module == "self_attention.linear_qkv":
        groups = 2 if case.llama else 4
        qkv = torch.cat(parts).unflatten(0, (groups, -1, 8))  # a head's size is 8
        cut = {"q": qkv[:, :-2], "k": qkv[:, -2:-1], "v": qkv[:, -1:]}
        return [(f"{prefix}.attention.{part}{last}", tensor.flatten(0, 2)) for part, tensor in cut.items()]
    if module == "mlp.linear_fc1" and case.llama:
        gate, up = (torch.cat([part.chunk(2)[i] for part in parts]) for i in (0, 1))
        return [(f"{prefix}.mlp.gate{last}", gate), (f"{prefix}.mlp.up{last}", up)]
    if module == "mlp.linear_fc1":
        return [(f"{prefix}.mlp.up{last}", torch.cat(parts))]
    whole = {"self_attention.linear_proj": "attention.o", "mlp.linear_fc2": "mlp.down"}.get(module)
    if whole:
        return [(f"{prefix}.{whole}{last}", torch.cat(parts, 1) if last == ".weight" else parts[0])]
    norms = {
        "input_layernorm": "input_norm", "pre_mlp_layernorm": "mlp_norm", "self_attention.q_layernorm":
        "attention.q_norm", "self_attention.k_layernorm": "attention.k_norm",
    }  # fmt: skip
    if module in norms:
        return [(f"{prefix}.{norms[module]}{last}", parts[0])]
    whole = {"decoder.final_layernorm": "final_norm", "embedding.position_embeddings": "position_embedding"}[first]
    return [(f"{whole}{last}", parts[0])]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_state_bitwise(written: Written, converted: Callable[[str], Converted], case: Case) -> None:
    found, wanted = tensors(converted(case.name)), expected(written, case)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("case", [case for case in WHOLE if not case.sharding], ids=lambda case: case.name)
def test_older_files_hold_the_same(converted: Callable[[str], Converted], case: Case) -> None:
    found, wanted = tensors(converted(f"{case.name}-old")), tensors(converted(case.name))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    theirs, ours = (
        json.loads((converted(name).directory / "manifest.json").read_text())["metadata"]
        for name in (f"{case.name}-old", case.name)
    )
    assert theirs | {"source": ""} == ours | {"source": ""}


@pytest.mark.parametrize(
    "case", [case for case in WHOLE if case.pp == 1 and not case.bf16], ids=lambda case: case.name
)
def test_logits(written: Written, converted: Callable[[str], Converted], case: Case) -> None:
    done = converted(case.name)
    model = GPTModel(done.config.model)
    load(done.directory, [Shard("model", p, p.pieces) for p in model.parameters()])  # type: ignore[arg-type]
    theirs = torch.from_numpy(written.of(case)[0]["logits"])
    with torch.no_grad():
        ours = model.eval()(probe())
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def losses(save: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def train(flags: str) -> None:
    assert main(["pretrain", *flags.split()]) == 0


@pytest.mark.parametrize("name", ["llama-tp2", "gpt2-pp2", "gpt2-dp2", "llama-dp2", "gpt2-bf16-old"])
def test_training_goes_on(written: Written, converted: Callable[[str], Converted], tmp_path: Path, name: str) -> None:
    """By the settings that came with it, on another layout: the next losses are megatron-core's."""
    case, root = BY_NAME[name.removesuffix("-old")], converted(name).directory.parent
    train(f"--config {root}/config.yaml --load {root} --save {tmp_path} --num-workers 0")
    wanted = written.of(case)[-1]["losses"][SAVED_AT:]
    assert len(wanted) == STEPS - SAVED_AT
    np.testing.assert_allclose(losses(tmp_path), wanted, rtol=2e-2 if case.bf16 else 2e-5)


def test_settings_come_with_it(converted: Callable[[str], Converted]) -> None:
    config = converted("llama-tp2").config
    assert (config.model.vocab_size, config.model.padded_vocab_size, config.model.rotary_base) == (251, 256, 5000.0)
    assert (config.training.seed, config.training.global_batch_size, config.optimizer.lr) == (7, 4, 1e-2)
    assert config.data.data_order == "megatron" and converted("llama-tp2").step == SAVED_AT
    metadata = json.loads((converted("llama-tp2").directory / "manifest.json").read_text())["metadata"]
    assert metadata["progress"] == {"step": 2, "samples": 8, "tokens": 128} and metadata["optimizer_steps"] == 2
