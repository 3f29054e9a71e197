"""Save and load on one process: round trips, atomicity, and every kind of damage, each with its sentence."""

import ast
import resource
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megasp import checkpoints
from megasp.checkpoints import (
    Shard,
    check_same_model,
    check_writable,
    find_latest,
    load,
    read_manifest,
    safetensors_file,
    save,
    writer,
)
from megasp.checkpoints.manifest import Manifest, StoredTensor, merge
from megasp.checkpoints.safetensors_file import StoredFile
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from megasp.parameters import rows_of, whole
from tests.unit.checkpoints.cases import D, mismatches, reference, save_one, shards

MODEL = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=4, vocab_size=20)


def refused(message: str) -> Any:
    return pytest.raises(CheckpointError, match=message)


def test_round_trip(tmp_path: Path) -> None:
    metadata = {"config": {"seed": 7}, "tokens": 2**60, "lr": 1e-4, "name": "ünï", "none": None}
    directory = save_one(tmp_path, 100, **metadata)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100"]
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "rank_00000.safetensors"]
    held = shards(1, 0, fill=False)
    manifest = load(tmp_path, held)
    assert (manifest.step, manifest.layout, manifest.metadata) == (100, "tp1-pp1-u1-r1-dp1", metadata)
    assert list(mismatches(held)) == []
    assert list(mismatches(shards(1, 0, fill=False))) != []  # the check can fail
    assert read_manifest(directory) == manifest == Manifest.from_json(manifest.to_json())


def test_file_reads_with_plain_safetensors(tmp_path: Path) -> None:
    tensors = load_file(save_one(tmp_path) / "rank_00000.safetensors")
    name = "layers.0.attention.k.weight"
    assert torch.equal(tensors[f"exp_avg/{name}"], reference("exp_avg", whole(name, (4, D))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Odd sizes of several dtypes in one file stay readable and exact; views of any stride are taken."""
    odd, pieces = torch.arange(15.0).view(5, 3).t().to(dtype), (whole("odd", (3, 5)),)
    other = Shard("model", torch.randn(7), (whole("other", (7,)),))
    save(tmp_path, 1, [Shard("model", odd, pieces), other], ParallelState.single(), {})
    out = torch.zeros(3, 5, dtype=dtype)
    load(tmp_path, [Shard("model", out, pieces)])
    assert torch.equal(out.float(), odd.float())


def test_two_boxes_of_a_tensor_on_one_rank(tmp_path: Path) -> None:
    values, pieces = torch.randn(7, 3), (whole("w", (7, 3)),)
    halves = [Shard("model", values[a:b], rows_of(pieces, a, b)) for a, b in ((3, 7), (0, 3))]
    directory = save(tmp_path, 1, halves, ParallelState.single(), {})
    assert [box.key for box in read_manifest(directory).tensors["model/w"].boxes] == ["model/w", "model/w#1"]
    out = torch.zeros(5, 3)
    load(directory, [Shard("model", out, rows_of(pieces, 1, 6))])
    assert torch.equal(out, values[1:6])


def test_weights_convert_and_moments_do_not(tmp_path: Path) -> None:
    save_one(tmp_path)
    model, *_ = shards(1, 0)
    half = replace(model, tensor=model.tensor.bfloat16() * 0)
    load(tmp_path, [half])
    assert torch.equal(half.tensor, model.tensor.bfloat16())
    with refused(
        r"exp_avg/embedding.weight is torch.float32 in the checkpoint and torch.bfloat16 here.*--no-load-optim"
    ):
        load(tmp_path, [replace(half, kind="exp_avg")])


def test_latest_and_order(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None and find_latest(tmp_path / "nowhere") is None
    first, second = save_one(tmp_path, 1), save_one(tmp_path, 2)
    assert find_latest(tmp_path) == second and find_latest(first) == first
    (tmp_path / "latest").write_text("step_00000001\n")
    assert find_latest(tmp_path) == first
    (tmp_path / "latest").write_bytes(b"\xff../../elsewhere")
    assert find_latest(tmp_path) == second
    (second / "manifest.json").unlink()
    assert find_latest(tmp_path) == first


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save_one(tmp_path, 1, run="old")
    directory = save_one(tmp_path, 1, run="new")
    assert read_manifest(directory).metadata == {"run": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    directory.rename(tmp_path / "step_00000001.replaced")  # killed between the two renames
    assert load(tmp_path, []).metadata == {"run": "new"}


class Killed(BaseException):
    """Passes every `except Exception`, as a signal does."""


def test_killed_before_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_one(tmp_path, 1)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(writer, "_publish", die)
        save_one(tmp_path, 2)
    stale = tmp_path / ".step_00000002.partial"
    assert (stale / "rank_00000.safetensors").is_file()
    assert find_latest(tmp_path) == first
    (stale / "rank_00099.safetensors").touch()
    second = save_one(tmp_path, 2)
    assert not stale.exists() and find_latest(tmp_path) == second
    assert not (second / "rank_00099.safetensors").exists()


def test_full_disk(tmp_path: Path) -> None:
    """A write that the kernel refuses: here by the limit on file sizes."""
    first = save_one(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with refused(r"step_00000002 failed on rank 0: File too large.*nothing of it is kept; check the space"):
            save_one(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find_latest(tmp_path) == first


def test_files_of_other_ranks_must_be_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "write", lambda *_: StoredFile(10))
    with refused("rank 0: another rank's file is not here, so --save is not on a shared file system"):
        save_one(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(r"--save .*file/ckpt: the directory must be writable \(Not a directory\)"):
        check_writable(tmp_path / "file" / "ckpt")
    with refused("failed on rank 0: Not a directory"):
        save_one(tmp_path / "file" / "ckpt")
    check_writable(tmp_path / "new" / "ckpt")
    assert list((tmp_path / "new" / "ckpt").iterdir()) == []


def test_unsavable_tensors_and_metadata(tmp_path: Path) -> None:
    complex_shard = Shard("model", torch.zeros(3, dtype=torch.complex64), (whole("odd", (3,)),))
    with refused("model/odd has dtype torch.complex64"):
        save(tmp_path, 1, [complex_shard], ParallelState.single(), {})
    with refused("not JSON serializable"):
        save_one(tmp_path, 1, path=tmp_path)
    with refused("the ranks together hold 320 elements of model/embedding.weight, which has 160"):
        save(tmp_path, 1, shards(1, 0) * 2, ParallelState.single(), {})
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    with refused(
        f"no checkpoint in {tmp_path}: a complete one is a directory such as step_00000100 with a manifest.json"
    ):
        load(tmp_path, [])
    with refused("manifest.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"step": 1,', '"step": 2,', "its content does not match its own hash"),
        ("1e-05", "1E-05", "its content does not match its own hash"),
        ('"version": 2,', '"version": 9,', "it has version 9 and this megasp reads versions 1 and 2"),
        ("megasp-checkpoint", "other", "it does not say format megasp-checkpoint"),
        ("}", "", "manifest.json cannot be used"),
        ("{", "[{", "manifest.json cannot be used"),
    ],
)
def test_damaged_manifest(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = save_one(tmp_path, lr=1e-5) / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with refused(message):
        load(tmp_path, [])
    path.write_bytes(b"\xff\x00")
    with refused("manifest.json cannot be used"):
        load(tmp_path, [])


def test_manifest_names_no_file_outside(tmp_path: Path) -> None:
    manifest = read_manifest(save_one(tmp_path))
    outside = replace(manifest, files={"../latest": next(iter(manifest.files.values()))})
    (tmp_path / "step_00000001" / "manifest.json").write_text(outside.to_json())
    with refused("its file ../latest is not inside the checkpoint's directory"):
        load(tmp_path, [])


def test_damaged_files(tmp_path: Path) -> None:
    file = save_one(tmp_path) / "rank_00000.safetensors"
    good, held = file.read_bytes(), shards(1, 0, fill=False)
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    file.write_bytes(damaged)
    with refused("rank_00000.safetensors does not have the SHA-256 that the manifest says.*load an earlier checkpoint"):
        load(tmp_path, held)
    load(tmp_path, held, verify_hashes=False)
    file.write_bytes(good[:-1])
    with refused(f"rank_00000.safetensors has {len(good) - 1} bytes where the manifest says {len(good)}"):
        load(tmp_path, held)
    file.write_bytes(b"\xff" * len(good))
    with refused("rank_00000.safetensors is no safetensors file"):
        load(tmp_path, held, verify_hashes=False)
    file.unlink()
    with refused("rank_00000.safetensors is missing"):
        load(tmp_path, held)
    load(tmp_path, [])  # a file that is not read is not asked for


def test_stored_boxes_that_do_not_cover(tmp_path: Path) -> None:
    manifest = read_manifest(save_one(tmp_path))
    name = "model/embedding.weight"
    tensors = manifest.tensors | {name: replace(manifest.tensors[name], boxes=())}
    (tmp_path / "step_00000001" / "manifest.json").write_text(replace(manifest, tensors=tensors).to_json())
    with refused("model/embedding.weight in .* is not whole: its boxes give 0 of 160 elements"):
        load(tmp_path, shards(1, 0))


def test_unknown_dtype(tmp_path: Path) -> None:
    manifest = read_manifest(save_one(tmp_path))
    tensors = {name: replace(tensor, dtype="F4") for name, tensor in manifest.tensors.items()}
    (tmp_path / "step_00000001" / "manifest.json").write_text(replace(manifest, tensors=tensors).to_json())
    with refused("model/embedding.weight in .* has dtype F4: megasp reads F64"):
        load(tmp_path, shards(1, 0))


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    save_one(tmp_path, config={"model": asdict(MODEL)})
    held = shards(1, 0, fill=False)
    wide = Shard("model", torch.zeros(20, 16), (whole("embedding.weight", (20, 16)),))
    with refused(r"\(model/embedding.weight is \[20, 8\] there and \[20, 16\] here\).*--num-layers 1 --hidden-size 8"):
        load(tmp_path, [*held, wide])
    assert not any(shard.tensor.any() for shard in held)  # refused before anything is changed
    deep = Shard("model", torch.zeros(8), (whole("layers.1.input_norm.weight", (8,)),))
    with refused(r"another model \(model/layers.1.input_norm.weight is missing\)"):
        load(tmp_path, [deep])


def test_missing_optimizer(tmp_path: Path) -> None:
    model_only = [shard for shard in shards(1, 0) if shard.kind == "model"]
    save(tmp_path, 1, model_only, ParallelState.single(), {})
    with refused("holds no exp_avg: it was saved without the optimizer's state; add --no-load-optim"):
        load(tmp_path, shards(1, 0))


def test_same_model_by_config(tmp_path: Path) -> None:
    manifest = read_manifest(save_one(tmp_path, config={"model": asdict(MODEL)}))
    check_same_model(manifest, replace(MODEL, kv_channels=2, rotary_base=5e5, hidden_dropout=0.0))
    with refused("of step 1 is of another model .num_layers is 1 there and 2 here.*--num-layers 1"):
        check_same_model(manifest, replace(MODEL, num_layers=2))
    with refused("swiglu is False there and True here"):
        check_same_model(manifest, replace(MODEL, swiglu=True, ffn_hidden_size=32))
    check_same_model(replace(manifest, metadata={}), MODEL)


def test_ranks_that_disagree() -> None:
    tensor = StoredTensor("F32", (2, 2), ())
    with pytest.raises(ValueError, match="on one rank and"):
        merge([({"model/x": tensor}, {}), ({"model/x": replace(tensor, dtype="BF16")}, {})])


def test_no_pickle() -> None:
    """Nothing here imports pickle or calls torch.save or torch.load, but the one file that reads them restricted."""
    for path in Path(checkpoints.__file__).parent.rglob("*.py"):
        if path.name == "torch_files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("save", "load"), path
