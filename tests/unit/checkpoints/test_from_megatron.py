"""Conversion from Megatron-LM, against megatron-core itself: it writes the checkpoints, and trains on beside us."""

import argparse
import json
import os
import pickle
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
from megasp.checkpoints.megatron.conversion import Converted, _loss_scale, _steps, from_megatron
from megasp.checkpoints.megatron.rank_files import read_rank_files
from megasp.checkpoints.megatron.torch_files import Record, read_torch
from megasp.cli import main
from megasp.errors import CheckpointError, ConfigError
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


@pytest.mark.parametrize("case", [case for case in WHOLE if case.pp == 1 and not case.bf16], ids=lambda case: case.name)
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


def train_on_ranks(flags: str) -> None:
    import torch.distributed as dist

    from megasp import parallel_state
    from megasp.config.load import load as read
    from megasp.config.load import parser
    from megasp.config.validate import validate
    from megasp.training.build import build
    from megasp.training.datasets import resolve
    from megasp.training.pretrain import pretrain

    config = resolve(read(flags.split(), parser("pretrain", ""))[0])
    layout = validate(config, dist.get_world_size())
    pretrain(build(config, parallel_state.build(layout, torch.device("cpu"))))


def test_training_goes_on_in_another_layout(
    written: Written, converted: Callable[[str], Converted], tmp_path: Path
) -> None:
    """Trained at dp2 with the distributed optimizer, it goes on at tp2."""
    root = converted("gpt2-dp2").directory.parent
    flags = f"--config {root}/config.yaml --load {root} --save {tmp_path} --tensor-model-parallel-size 2"
    run_ranks(train_on_ranks, 2, flags)
    np.testing.assert_allclose(losses(tmp_path), written.of(BY_NAME["gpt2-dp2"])[0]["losses"][SAVED_AT:], rtol=2e-5)


def test_another_order_of_samples_is_said(
    converted: Callable[[str], Converted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = converted("gpt2-dp2").directory.parent
    train(f"--config {root}/config.yaml --load {root} --save {tmp_path} --num-workers 0 --data-order keyed")
    assert "in Megatron-LM's order, and all data begins anew: --data-order megatron" in capsys.readouterr().out
    assert len(losses(tmp_path)) == STEPS - SAVED_AT


# Refusals


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


Change = Callable[[Path], None]


def _common(**args: Any) -> Change:
    """Other settings; None removes all of them."""

    def change(directory: Path) -> None:
        common = read_torch(directory / "common.pt")
        values = {name: value for name, value in vars(common["args"]).items() if not isinstance(value, Record)}
        torch.save({"iteration": 2, "args": argparse.Namespace(**values | args)}, directory / "common.pt")

    return change


def test_norms_around_zero(written: Written, converted: Callable[[str], Converted], tmp_path: Path) -> None:
    """--apply-layernorm-1p: their norm multiplies by 1 + w, ours by w; moments are those of both."""
    copy = shutil.copytree(written.root / "gpt2-pp2", tmp_path / "theirs")
    _common(apply_layernorm_1p=True)(next(copy.glob("iter_*")))
    found, plain = tensors(from_megatron(copy, tmp_path / "ours")), tensors(converted("gpt2-pp2"))
    norms = {name for name in plain if name.startswith("model/") and name.endswith("norm.weight")}
    assert len(norms) == 5 and found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor + (name in norms)) for name, tensor in plain.items())


def _no_args(directory: Path) -> None:
    torch.save({"iteration": 2}, directory / "common.pt")


def _metadata(directory: Path) -> Any:
    return pickle.loads((directory / ".metadata").read_bytes())


def _without(key: str) -> Change:
    def change(directory: Path) -> None:
        metadata = _metadata(directory)
        del metadata.state_dict_metadata[key]
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return change


def _extra(directory: Path) -> None:
    metadata = _metadata(directory)
    key = next(index for index in metadata.storage_data if "fc2.weight" in index.fqn)
    router = "decoder.layers.0.mlp.router.weight"
    metadata.state_dict_metadata[router] = metadata.state_dict_metadata[key.fqn]
    metadata.storage_data |= {
        type(key)(router, index.offset, index.index): info
        for index, info in metadata.storage_data.items()
        if index.fqn == key.fqn
    }
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _dtype(kind: str, dtype: torch.dtype) -> Change:
    def change(directory: Path) -> None:
        metadata = _metadata(directory)
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(kind) and hasattr(entry, "properties"):
                entry.properties.dtype = dtype
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return change


def _outside(directory: Path) -> None:
    metadata = _metadata(directory)
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _truncated(directory: Path) -> None:
    for path in directory.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:-200])


def _flipped(directory: Path) -> None:
    for path in directory.glob("*.distcp"):
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def _removed(pattern: str) -> Change:
    def change(directory: Path) -> None:
        for path in list(directory.glob(pattern)):
            path.unlink()

    return change


def _runs(name: str) -> Change:
    def change(directory: Path) -> None:
        evil = Runs(directory.parents[1] / "ran")
        if name == "common.pt":
            torch.save({"args": evil, "iteration": 2}, directory / name)
        elif name == ".metadata":
            (directory / name).write_bytes(pickle.dumps(evil))
        else:
            metadata, content = _metadata(directory), b""
            for path in directory.glob("*.distcp"):
                torch.save(evil, path)
                content = path.read_bytes()
            for info in metadata.storage_data.values():
                info.offset, info.length = 0, len(content)
            (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return change


def _backend(directory: Path) -> None:
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr"}')


NEVER_RUN = "only tensors, numbers, containers and Megatron-LM's settings are read from it, and nothing is ever run"
BAD: dict[str, tuple[Change, str]] = {
    "code in common.pt": (_runs("common.pt"), rf"common.pt names posix.mkdir: {NEVER_RUN}"),
    "code in .metadata": (_runs(".metadata"), rf".metadata names posix.mkdir: {NEVER_RUN}"),
    "code in a tensor": (_runs("a tensor"), rf"distcp names posix.mkdir: {NEVER_RUN}"),
    "missing tensor": (
        _without("decoder.final_layernorm.weight"),
        r"has no tensor decoder.final_layernorm.weight: it holds model/final_norm.weight of the model",
    ),
    "missing moment": (
        _without("optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"),
        r"has no tensor exp_avg_sq of decoder.final_layernorm.weight",
    ),
    "experts": (
        _common(num_experts=8),
        r"model has num_experts 8: megasp computes models with it unset; this model cannot",
    ),
    "latent attention": (_common(multi_latent_attention=True), r"has multi_latent_attention True"),
    "a router": (_extra, r"has a tensor decoder.layers.0.mlp.router.weight: .*only dense GPT models convert"),
    "another width": (
        _common(hidden_size=64),
        r"embedding.word_embeddings.weight in .* is \[256, 32\]: embedding.weight is \[256, 32\] there and \[256, 64\]",
    ),
    "another vocabulary": (
        _common(padded_vocab_size=512, vocab_size=500),
        r"is \[256, 32\] there and \[512, 32\] .*give --vocab-size 256 --make-vocab-size-divisible-by 1",
    ),
    "no args": (
        _no_args,
        r"does not say what model it is: .*give the model's flags: --num-layers --hidden-size .*--seq-length",
    ),
    "sizes": (_common(num_query_groups=3), r"num-attention-heads 4 and num-query-groups 3"),
    "no layers": (_common(num_layers=0), r"--num-layers is not given"),
    "no samples": (_common(consumed_train_samples=None), r"consumed samples: .*give --consumed-train-samples N"),
    "moments of 8 bits": (
        _dtype("optimizer.state.exp_avg.", torch.uint8),
        r"exp_avg of embedding.word_embeddings.weight in .* is torch.uint8: weights and moments are fp32, bf16 or fp16",
    ),
    "no masters": (_dtype("decoder", torch.bfloat16), r"has no master weights: .* is torch.bfloat16"),
    "metadata that lies": (
        _dtype("optimizer.state.exp_avg.", torch.float16),
        r"a part of .* is .* of torch.float32: its metadata says .* of torch.float16",
    ),
    "outside": (_outside, r".metadata cannot be used: .*\.\./__\d_\d.distcp is not inside the checkpoint's directory"),
    "truncated": (_truncated, r"distcp cannot be read: it must be whole"),
    "damaged": (_flipped, r"distcp cannot be read: it must be whole"),
    "no files": (_removed("*.distcp"), r"distcp cannot be read: No such file"),
    "no metadata": (_removed(".metadata"), r"\.metadata cannot be read: No such file"),
    "format": (_backend, r"has format zarr: megasp reads torch_dist; .*--ckpt-format torch_dist"),
    "nothing": (_removed("metadata.json"), r"is no checkpoint of Megatron-LM's: it holds neither metadata.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(written: Written, tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    directory = tmp_path / "theirs" / "iter_0000002"
    shutil.copytree(written.root / "llama-tp2" / "iter_0000002", directory)
    change(directory)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        from_megatron(directory, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]  # and nothing ran


def test_optimizer_in_buckets(written: Written, tmp_path: Path) -> None:
    message = r"state in .* is not by parameter: .*_dist --dist-ckpt-optim-fully-reshardable, .*--no-load-optim"
    with pytest.raises(CheckpointError, match=message):
        from_megatron(written.root / "buckets", tmp_path / "ours")
    done = from_megatron(written.root / "buckets", tmp_path / "ours", optimizer=False)
    wanted = expected(written, BY_NAME["buckets"])
    assert tensors(done).keys() == {name for name in wanted if name.startswith("model/")}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(done).items())


def _before_core(directory: Path) -> None:
    torch.save({"model": {"language_model": {}}, "iteration": 2}, directory / "mp_rank_00" / "model_optim_rng.pt")


def _another_optimizer(directory: Path) -> None:
    weights = {"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(4, 4)}
    for rank in directory.glob("mp_rank_*"):
        state = {"state": {0: {}}, "param_groups": [{"params": [0, 1]}]}
        torch.save({"model": weights, "optimizer": state, "iteration": 2}, rank / "model_optim_rng.pt")


BAD_OLD: dict[str, tuple[Change, str]] = {
    "code": (
        lambda directory: torch.save(
            Runs(directory.parents[1] / "ran"), directory / "mp_rank_01" / "model_optim_rng.pt"
        ),
        rf"model_optim_rng.pt names posix.mkdir: {NEVER_RUN}",
    ),
    "a rank": (
        lambda directory: shutil.rmtree(directory / "mp_rank_00"),
        r"holds 1 ranks' files: the ranks are tensor 2 x pipeline 1",
    ),
    "experts": (
        lambda directory: (directory / "mp_rank_00").rename(directory / "mp_rank_00_000_000"),
        r"is no rank of a dense model",
    ),
    "before megatron-core": (_before_core, r"holds another kind of model: .*tools/checkpoint/convert.py"),
    "optimizer": (_another_optimizer, r"cannot be matched: a group of it has 2 parameters, and the model 1 such"),
    "distributed optimizer": (
        lambda directory: (directory / "mp_rank_00" / "distrib_optim.pt").touch(),
        r"is not by parameter",
    ),
    "another model on a rank": (
        lambda directory: torch.save(
            {"model": {"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(4)}},
            directory / "mp_rank_01" / "model_optim_rng.pt",
        ),
        r"the files of .* cannot be used: they must hold the same tensors of one model",
    ),
    "truncated": (
        lambda directory: os.truncate(directory / "mp_rank_00" / "model_optim_rng.pt", 10_000),
        r"model_optim_rng.pt cannot be read: it must be whole",
    ),
}


@pytest.mark.parametrize("name", BAD_OLD)
def test_bad_older_files(written: Written, tmp_path: Path, name: str) -> None:
    change, message = BAD_OLD[name]
    directory = tmp_path / "theirs" / "iter_0000002"
    shutil.copytree(written.root / "llama-tp2-old" / "iter_0000002", directory)
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        from_megatron(directory, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_flat_state(written: Written, tmp_path: Path) -> None:
    """As megatron-core before 0.14 stored its distributed optimizer's: ranges of each rank's box, laid flat."""
    directory = tmp_path / "theirs"
    shutil.copytree(written.root / "llama-tp2" / "iter_0000002", directory)
    metadata = _metadata(directory)
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"
    entry = metadata.state_dict_metadata[key]
    grid = [total // size for total, size in zip(entry.size, entry.chunks[0].sizes, strict=True)]
    flat, places = [], {}
    for chunk in entry.chunks:
        index, place = next(
            (index, info)
            for index, info in metadata.storage_data.items()
            if (index.fqn, index.offset) == (key, chunk.offsets)
        )
        tensor = read_torch(directory / place.relative_path, place.offset, place.offset + place.length).flatten()
        cell = [start // size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for start, part in ((0, tensor[:100]), (100, tensor[100:])):
            file = directory / f"__flat_{len(flat)}.distcp"
            torch.save(part.clone().view(1, 1, 1, -1), file)
            offset = torch.Size([*cell, start])
            flat.append(type(chunk)(offset, torch.Size([1, 1, 1, len(part)])))
            places[type(index)(key, offset)] = type(place)(file.name, 0, file.stat().st_size)
    metadata.state_dict_metadata[key] = type(entry)(entry.properties, torch.Size([*grid, len(tensor)]), flat)
    metadata.storage_data |= places
    metadata.mcore_data = {key: {"nd_reformulated_orig_global_shape": entry.size}}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    wanted = expected(written, BY_NAME["llama-tp2"])
    found = tensors(from_megatron(directory, tmp_path / "ours"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_settings(written: Written, tmp_path: Path) -> None:
    """The model's flags, and what else a run must know, may be given."""
    directory = tmp_path / "theirs"
    shutil.copytree(written.root / "gpt2-dp2" / "iter_0000002", directory)
    common = read_torch(directory / "common.pt")
    torch.save({"iteration": 2, "optimizer": common["optimizer"]}, directory / "common.pt")
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 256 --max-position-embeddings 16"
    command = f"convert from-megatron --input {directory} --save {tmp_path}/ours --consumed-train-samples 8 {flags}"
    assert main([*command.split(), "--seq-length", "16", "--seed", "7"]) == 0
    found = load_file(tmp_path / "ours" / "step_00000002" / "model.safetensors")
    wanted = expected(written, BY_NAME["gpt2-dp2"])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    manifest = json.loads((tmp_path / "ours" / "step_00000002" / "manifest.json").read_text())
    assert manifest["metadata"]["rng"] == {"seed": 7} and manifest["metadata"]["progress"]["samples"] == 8


def test_command(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["convert", "from-megatron", "--input", str(written.root / "llama-tp2"), "--save", "ours"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "wrote ours/step_00000002/model.safetensors" in said
    assert "pretrain_gpt.py --config ours/config.yaml --load ours --save ours ...    goes on after step 2" in said
    assert main(["checkpoint", "verify", "ours"]) == 0
    assert main(command) == 2 and "--save ours holds checkpoints" in capsys.readouterr().err


def test_virtual_stages_of_older_files(tmp_path: Path) -> None:
    """Layers go through all stages, chunk by chunk; each file counts from 0."""
    for stage in range(2):
        folder = tmp_path / f"mp_rank_00_{stage:03d}"
        folder.mkdir()
        models = {
            f"model{chunk}": {"decoder.layers.0.mlp.linear_fc2.bias": torch.full((3,), 2.0 * chunk + stage)}
            for chunk in range(2)
        }
        torch.save({"iteration": 1, **models}, folder / "model_optim_rng.pt")
    stored = read_rank_files(tmp_path, {}, optimizer=True)
    assert {key: source.rows([range(3)], torch.float32).tolist() for key, source in stored.sources.items()} == {
        f"decoder.layers.{layer}.mlp.linear_fc2.bias": [layer] * 3 for layer in range(4)
    }


def test_weights_alone_of_older_files(written: Written, tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    shutil.copytree(written.root / "gpt2-pp2-old" / "iter_0000002", directory)
    done = from_megatron(directory, tmp_path / "ours", optimizer=False)
    wanted = expected(written, BY_NAME["gpt2-pp2"])
    assert all(
        name.startswith("model/") and torch.equal(tensor, wanted[name]) for name, tensor in tensors(done).items()
    )


def test_loss_scale_and_steps_of_fp16() -> None:
    """Where a step overflowed Adam has taken fewer than the run."""
    scaler = {"scale": torch.tensor([512.0]), "growth_tracker": 3, "hysteresis_tracker": 1}
    groups = {"param_groups": [{"lr": 1.0, "step": 7}, {"lr": 1.0, "step": 7}]}
    common = {"optimizer": {"grad_scaler": scaler, "optimizer": groups}}
    assert _loss_scale(common) == {"scale": 512.0, "good_steps": 3, "overflows_left": 1} and _steps(common, 9) == 7
    assert _loss_scale({})["scale"] == 1.0 and _steps({}, 9) == 9
