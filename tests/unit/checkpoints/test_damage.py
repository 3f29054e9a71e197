"""What happens to checkpoints: damaged, half written, too many, or on a disk that fails. Each has its sentence."""

import errno
import hashlib
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasp.checkpoints import Retention, Saver, find_latest, load, newest_good, read_manifest, safetensors_file, writer
from megasp.checkpoints.manifest import candidates
from megasp.checkpoints.verify import damage
from megasp.cli import main
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from tests.unit.checkpoints.cases import mismatches, save_one, save_ranks, shards

SINGLE = ParallelState.single()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks = [shards(2, 0), shards(2, 1)]
    return save_ranks(tmp_path_factory.mktemp("written"), "tp2", ranks)


@given(st.integers(0, 10**9))
def test_a_flipped_byte_is_named(written: Path, place: int) -> None:
    """Anywhere in a file, its header or the manifest: the file is named, and the tensor or the header."""
    paths = sorted(path for path in written.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    at = place % sum(sizes)
    index = next(index for index in range(len(paths)) if at < sum(sizes[: index + 1]))
    path, at = paths[index], at - sum(sizes[:index])
    good = path.read_bytes()
    places = safetensors_file.layout(path) if path.suffix == ".safetensors" else {}
    try:
        flip(path, at)
        (problem,) = damage(written)
        assert str(path) in problem
        if places:
            inside = [key for key, (start, stop) in places.items() if start <= at < stop]
            assert problem.endswith(f"(damaged: {inside[0] if inside else 'the header'})")
    finally:
        path.write_bytes(good)
    assert damage(written) == []


def test_version_1_still_loads_and_verifies(tmp_path: Path) -> None:
    """A file's SHA-256 was that of all its bytes, and sums told the tensors."""
    directory = save_one(tmp_path)
    path, manifest = directory / "rank_00000.safetensors", directory / "manifest.json"
    document = json.loads(manifest.read_text()) | {"version": 1}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    document["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": digest, "checksums": {"model/w": "00"}}}
    del document["sha256"]
    document["sha256"] = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    manifest.write_text(json.dumps(document))
    held = shards(1, 0, fill=False)
    load(tmp_path, held)
    assert list(mismatches(held)) == [] and damage(directory) == []
    flip(path, -1)
    assert f"{path} does not have the SHA-256 that the manifest says (damaged: somewhere" in damage(directory)[0]
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        load(tmp_path, held)


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = save_one(tmp_path, 1), save_one(tmp_path, 2)
    (tmp_path / ".step_00000003.partial").mkdir()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{second}: 1 files, 27 tensors" in said and f"{first}: 1 files" in said and ".partial was never" in said
    flip(second / "rank_00000.safetensors", -1)
    (first / "rank_00000.safetensors").unlink()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "(damaged: exp_avg_sq/layers.0.mlp.down.weight)" in said and "rank_00000.safetensors is missing" in said
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2


def test_several_tensors_and_the_header(tmp_path: Path) -> None:
    directory = save_one(tmp_path)
    path = directory / "rank_00000.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-2000] + bytes(2000))
    (problem,) = damage(directory)
    assert "damaged: " in problem and " more)" in problem
    path.write_bytes(bytes([255]) + good[1:])
    assert damage(directory)[0].endswith("(damaged: the header)")
    path.write_bytes(good[:-1])
    assert f"has {len(good) - 1} bytes where the manifest says {len(good)}" in damage(directory)[0]


def test_passed_over_for_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [save_one(tmp_path, step) for step in (1, 2, 3)]
    assert newest_good(tmp_path, SINGLE, strict=True) == directories[2]
    flip(directories[2] / "rank_00000.safetensors", -1)
    (directories[1] / "manifest.json").write_text("{")
    assert newest_good(tmp_path, SINGLE) == directories[0]
    with pytest.raises(
        CheckpointError, match=r"step_00000003.*SHA-256.*: with --load-strict the newest .* must be good"
    ):
        newest_good(tmp_path, SINGLE, strict=True)
    with pytest.raises(CheckpointError, match=r"SHA-256.*--load names this very checkpoint"):
        newest_good(directories[2], SINGLE)
    (directories[0] / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*: of the 3 that are there none"):
        newest_good(tmp_path, SINGLE)
    assert newest_good(tmp_path / "nowhere", SINGLE) is None


def test_unfinished_is_said_or_refused(tmp_path: Path) -> None:
    first = save_one(tmp_path, 1)
    (tmp_path / ".step_00000002.partial").mkdir()
    assert newest_good(tmp_path, SINGLE) == first
    with pytest.raises(CheckpointError, match=r"step_00000002.partial was never finished: with --load-strict"):
        newest_good(tmp_path, SINGLE, strict=True)
    save_one(tmp_path, 3)
    assert not (tmp_path / ".step_00000002.partial").exists()


def test_named_by_latest_comes_first(tmp_path: Path) -> None:
    directories = [save_one(tmp_path, step) for step in (1, 2, 3, 4)]
    (tmp_path / "latest").write_text("step_00000002\n")
    assert candidates(tmp_path) == [directories[1], directories[0], directories[3], directories[2]]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [10, 20, 30, 40, 50, 60]),
        (Retention(last=2), [50, 60]),
        (Retention(every=20), [20, 40, 60]),
        (Retention(last=2, every=30), [30, 50, 60]),
        (Retention(last=1), [60]),
    ],
)
def test_retention(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    with Saver(tmp_path, SINGLE, retention) as saver:
        for step in range(10, 70, 10):
            saver.save(step, shards(1, 0), {})
            assert saver.wait() is None
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step_*"))] == kept
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("step_")} == {"latest"}


@given(st.sets(st.integers(1, 99)), st.integers(1, 99), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 20))
def test_retention_keeps_the_new_one_and_what_is_beyond(
    steps: set[int], saved: int, last: int | None, every: int
) -> None:
    removed = Retention(last, every).removes([*steps, saved], saved)
    assert all(step < saved and step % every for step in removed)
    assert Retention(last, every).removes(sorted(steps - set(removed)), saved) == []


def test_a_damaged_newer_one_does_not_push_the_good_one_out(tmp_path: Path) -> None:
    save_one(tmp_path, 20)
    flip(save_one(tmp_path, 30) / "rank_00000.safetensors", -1)
    with Saver(tmp_path, SINGLE, Retention(last=1)) as saver:
        saver.save(25, shards(1, 0), {})
        assert saver.wait() is None
    assert newest_good(tmp_path, SINGLE) == tmp_path / "step_00000025"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000025", "step_00000030"]


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_one(tmp_path, 1)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched, Saver(tmp_path, SINGLE, Retention(last=1)) as saver:
        patched.setattr(writer.shutil, "rmtree", refuse)  # type: ignore[attr-defined]
        saver.save(2, shards(1, 0), {})
        assert saver.wait() is None
    assert candidates(tmp_path) == [tmp_path / "step_00000002"] and not first.exists()
    save_one(tmp_path, 3)
    assert not list(tmp_path.glob(".*"))


def test_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while the files wait to be written; what training changes after the copy is not in them."""
    go = threading.Event()
    write = safetensors_file.write

    def slow(*args: Any) -> Any:
        assert go.wait(30)
        return write(*args)

    monkeypatch.setattr(safetensors_file, "write", slow)
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter])
    held = shards(1, 0)
    with Saver(tmp_path, SINGLE, background=True, optimizer=optimizer) as saver:
        saver.save(1, held, {})
        optimizer.step()  # waits for the copy, not for the files
        for shard in held:
            shard.tensor.zero_()
        assert find_latest(tmp_path) is None and not saver.failed
        go.set()
        assert saver.wait() is None
        restored = shards(1, 0, fill=False)
        saver.save(2, restored, {})
    assert [path.name for path in candidates(tmp_path)] == ["step_00000002", "step_00000001"]
    load(tmp_path / "step_00000001", restored)
    assert list(mismatches(restored)) == []


def test_the_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is as it was when `save` was called, however long the copy takes; twice, as buffers are kept."""
    copy = Saver._copied_entry

    def slow(*args: Any) -> Any:
        time.sleep(0.005)
        return copy(*args)

    monkeypatch.setattr(Saver, "_copied_entry", slow)
    for waits in (True, False):
        held = shards(1, 0)
        parameters = [torch.nn.Parameter(shard.tensor) for shard in held]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        root = tmp_path / str(waits)
        with Saver(root, SINGLE, background=True, optimizer=optimizer if waits else None) as saver:
            for step in (1, 2):
                before = {shard.kind + shard.pieces[0].name: shard.tensor.clone() for shard in held}
                saver.save(step, held, {})
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                assert saver.wait() is None
                saved = shards(1, 0, fill=False)
                load(root / f"step_0000000{step}", saved)
                same = [torch.equal(shard.tensor, before[shard.kind + shard.pieces[0].name]) for shard in saved]
                assert all(same) == waits  # without the optimizer it would show


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_the_outcome_of_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Saver(tmp_path, SINGLE, background=background) as saver:
        with monkeypatch.context() as patched:
            patched.setattr(safetensors_file, "write", full)
            saver.save(1, shards(1, 0), {})
            error = saver.wait()
        assert "failed on rank 0: No space left on device" in str(error)
        assert list(tmp_path.iterdir()) == []
        saver.save(2, shards(1, 0), {})
        assert saver.wait() is None
    with pytest.raises(CheckpointError, match="No space left"), Saver(tmp_path, SINGLE, background=background) as saver:
        monkeypatch.setattr(safetensors_file, "write", full)
        saver.save(3, shards(1, 0), {})
    assert read_manifest(tmp_path / "step_00000002").step == 2
