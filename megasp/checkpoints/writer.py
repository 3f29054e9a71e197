"""Save a checkpoint: all of it appears at once, or nothing does.

    rank 0      make ROOT/.step_N.partial
    every rank  write and hash rank_R.safetensors in it
    rank 0      write manifest.json, rename the directory to ROOT/step_N, point ROOT/latest at it, remove old ones

Each phase ends on all ranks together: a failure on one is a `CheckpointError` on all. Files and directories are synced
before the rename, so a checkpoint that can be seen survives a loss of power. All of it may run in a thread, beside
training (`megasp.checkpoints.saver`).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasp import log
from megasp.checkpoints import safetensors_file
from megasp.checkpoints.manifest import (
    LATEST,
    MANIFEST,
    Manifest,
    Part,
    Shard,
    StoredBox,
    StoredTensor,
    candidates,
    directory_name,
    merge,
    step_of,
)
from megasp.checkpoints.safetensors_file import DTYPE_NAMES, Entry
from megasp.checkpoints.together import Failed, together
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from megasp.parameters import placed


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a directory stay when a new one is there.

    Attributes:
        last: so many, the newest ones up to that new one; all without it.
        every: and those whose step is a multiple of it.
    """

    last: int | None = None
    every: int | None = None

    def removes(self, steps: Sequence[int], saved: int) -> list[int]:
        """The steps whose checkpoints go when step `saved` has been written.

        Steps beyond it are left alone and count for nothing: they are of a run that this one went back from, maybe
        because they are damaged, and must not push a good one out.
        """
        if self.last is None and self.every is None:
            return []
        older = sorted({step for step in steps if step < saved}, reverse=True)
        beyond_last = older[(self.last or 1) - 1 :]  # the new one is the first of the last
        return [step for step in beyond_last if self.every is None or step % self.every]


def save(
    root: Path | str,
    step: int,
    shards: Sequence[Shard],
    state: ParallelState,
    metadata: dict[str, Any],
    retention: Retention = Retention(),
) -> Path:
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
    return write(root, step, lambda: Content.of(shards, state.rank), state, metadata, retention)


@dataclass(frozen=True)
class Content:
    """What one rank writes of a checkpoint: its file's name, the entries in it, and what they are parts of."""

    file: str
    entries: dict[str, Entry]
    tensors: dict[str, StoredTensor]

    @classmethod
    def of(cls, shards: Sequence[Shard], rank: int) -> "Content":
        """What rank `rank` writes of its shards: those that it owns, a box of a canonical tensor each."""
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
        return cls(file, entries, tensors)


def write(
    root: Path | str,
    step: int,
    content: Callable[[], Content],
    state: ParallelState,
    metadata: Mapping[str, Any],
    retention: Retention,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """`save` of what `content` gives when it is called, over the ranks' `group` (the world's own without it)."""
    root = Path(root)
    final, partial = root / directory_name(step), root / f".{directory_name(step)}.partial"

    def prepare() -> Content:
        if state.rank == 0:
            _start(root, partial)
        return content()

    def publish(parts: list[Part]) -> None:
        tensors, files = merge(parts)
        _publish(partial, final, Manifest(step, state.layout.name, dict(metadata), tensors, files))
        _remove_old(root, step, retention)

    try:
        prepared: list[Content] = []
        together(state, lambda: prepared.append(prepare()), group)
        parts = together(state, lambda: _write_content(partial, prepared[0]), group)
        together(state, lambda: publish(parts) if state.rank == 0 else None, group)
    except Failed as failed:
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


def _start(root: Path, partial: Path) -> None:
    """Make the directory to write in; what killed saves left is removed: there is never more than one at work."""
    for left in (*root.glob(".step_*.partial"), *root.glob(".step_*.removed")):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_content(partial: Path, content: Content) -> Part:
    """Write this rank's file, if it owns anything."""
    if not content.entries:
        return {}, {}
    file = safetensors_file.write(partial / content.file, list(content.entries.values()))
    return content.tensors, {content.file: file}


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Complete the directory and make it the latest checkpoint. Renames come last: they cannot run out of space."""
    for name, file in manifest.files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise OSError(0, "another rank's file is not here, so --save is not on a shared file system", str(path))
    write_text(partial / MANIFEST, manifest.to_json())
    write_text(partial / LATEST, final.name + "\n")
    sync_directory(partial)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    (final / LATEST).replace(final.parent / LATEST)
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old(root: Path, saved: int, retention: Retention) -> None:
    """Remove what need not be kept, now that step `saved` is safe. A failure is said, and harms nothing."""
    directories = candidates(root)
    removes = retention.removes([step_of(directory) for directory in directories], saved)
    for directory in directories:
        if step_of(directory) in removes:
            hidden = directory.with_name(f".{directory.name}.removed")
            try:
                directory.rename(hidden)  # at once: what is half removed must not look like a checkpoint
                shutil.rmtree(hidden)
            except OSError as error:
                log.warning(f"{directory} cannot be removed ({error.strerror}): some of it stays")


def write_text(path: Path, text: str) -> None:
    """Write a file and make its content durable."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make durable which names are in a directory."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
