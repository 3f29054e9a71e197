"""Save a checkpoint: all of it appears at once, or nothing does.

    rank 0      make ROOT/.step_N.partial
    every rank  write and hash rank_R.safetensors in it
    rank 0      write manifest.json, rename the directory to ROOT/step_N, point ROOT/latest at it

Each phase ends on all ranks together: a failure on one is a `CheckpointError` on all. Files and directories are synced
before the rename, so a checkpoint that can be seen survives a loss of power.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megasp.checkpoints import safetensors_file
from megasp.checkpoints.manifest import (
    LATEST,
    MANIFEST,
    Manifest,
    Part,
    Shard,
    StoredBox,
    StoredTensor,
    directory_name,
    merge,
)
from megasp.checkpoints.safetensors_file import DTYPE_NAMES, Entry
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from megasp.parameters import placed

T = TypeVar("T")


def save(root: Path | str, step: int, shards: Sequence[Shard], state: ParallelState, metadata: dict[str, Any]) -> Path:
    """Write the checkpoint of one step. Every rank calls it.

    Args:
        root: directory of checkpoints, on a file system that all ranks share.
        shards: what this rank holds. Of each box the replica 0 in a shard with `owner` is written.
        metadata: JSON values to keep beside the tensors; rank 0's are taken.
    Returns:
        The checkpoint's directory. One of the same step that was there is replaced.
    Raises:
        CheckpointError: on every rank, when any rank cannot write. What was there before is untouched.
    """
    root = Path(root)
    final, partial = root / directory_name(step), root / f".{directory_name(step)}.partial"

    def publish(parts: list[Part]) -> None:
        tensors, files = merge(parts)
        _publish(partial, final, Manifest(step, state.layout.name, metadata, tensors, files))

    try:
        _together(state, lambda: _start(partial) if state.rank == 0 else None)
        parts = _together(state, lambda: _write_shards(partial, shards, state.rank))
        _together(state, lambda: publish(parts) if state.rank == 0 else None)
    except _Failed as failed:
        if state.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        rule = "a checkpoint counts only when all ranks have written it, so nothing of it is kept"
        fix = f"check the space and permissions of {root}"
        raise CheckpointError(f"saving {final} failed on {failed}", rule, fix) from None
    return final


def check_writable(root: Path | str) -> None:
    """Refuse a directory in which no checkpoint could be written, before anything is trained. Makes it if need be.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"\0")
    except OSError as error:
        rule = f"the directory must be writable ({error.strerror})"
        raise CheckpointError(f"--save {root}", rule, "name a directory of your own, or free some space") from None


class _Failed(Exception):
    """What went wrong, and on which ranks."""


def _together(state: ParallelState, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank. Returns the results of all ranks on rank 0, nothing elsewhere.

    Raises:
        _Failed: on every rank, when any rank raised. Whatever it was: a rank that left alone would hang the others.
    """
    outcome: tuple[T | None, str | None]
    try:
        outcome = (action(), None)
    except OSError as error:
        outcome = (None, f"rank {state.rank}: {error.strerror or error} ({error.filename or 'while writing'})")
    except Exception as error:
        outcome = (None, f"rank {state.rank}: {error or type(error).__name__}")
    outcomes: list[Any] = [outcome] * (state.layout.world_size if state.rank == 0 else 0)
    failure: list[str | None] = [None]
    if state.layout.world_size > 1:
        dist.gather_object(outcome, outcomes or None, dst=0)
    if state.rank == 0:
        failure[0] = ", ".join(error for _, error in outcomes if error)
    if state.layout.world_size > 1:
        dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise _Failed(failure[0])
    return [result for result, _ in outcomes]


def _start(partial: Path) -> None:
    """Make the directory to write in; one that a killed run left is removed."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _write_shards(partial: Path, shards: Sequence[Shard], rank: int) -> Part:
    """Write this rank's file, if it owns anything."""
    file = f"rank_{rank:05d}.safetensors"
    entries: dict[str, Entry] = {}
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for piece, local in placed(shard.pieces) if shard.owner else ():
            if piece.replica:
                continue
            name = f"{shard.kind}/{piece.name}"
            key = name if name not in entries else f"{name}#{len(entries)}"
            view = shard.tensor.detach()[local.slices]
            entries[key] = Entry(key, view.dtype, piece.box.size, lambda view=view: view)  # type: ignore[misc]
            boxes = tensors[name].boxes if name in tensors else ()
            dtype = DTYPE_NAMES.get(view.dtype, str(view.dtype))
            tensors[name] = StoredTensor(dtype, piece.shape, (*boxes, StoredBox(piece.box, file, key)))
    if not entries:
        return {}, {}
    return tensors, {file: safetensors_file.write(partial / file, list(entries.values()))}


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Complete the directory and make it the latest checkpoint. Renames come last: they cannot run out of space."""
    for name, file in manifest.files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise OSError(0, "another rank's file is not here, so --save is not on a shared file system", str(path))
    _write_text(partial / MANIFEST, manifest.to_json())
    _write_text(partial / LATEST, final.name + "\n")
    _sync_directory(partial)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    (final / LATEST).replace(final.parent / LATEST)
    _sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make durable which names are in a directory."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
