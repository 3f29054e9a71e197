"""What conversion writes: whole tensors in files of a limited size, and maybe a checkpoint of ours around them."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megasp import log
from megasp.checkpoints import safetensors_file
from megasp.checkpoints.manifest import (
    LATEST,
    MANIFEST,
    Manifest,
    StoredBox,
    StoredTensor,
    candidates,
    directory_name,
)
from megasp.checkpoints.safetensors_file import DTYPE_NAMES, Entry, StoredFile
from megasp.checkpoints.writer import sync_directory, write_text
from megasp.errors import CheckpointError
from megasp.parameters import Box

SHARD_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"


def write_checkpoint(
    folder: Path, step: int, layout: str, metadata: dict[str, Any], entries: Sequence[Entry], shard_bytes: int
) -> None:
    """Write the checkpoint of one step into a directory of checkpoints that holds none.

    Args:
        layout: of the ranks that trained it, in words.
        entries: its tensors, under `kind/name`.
        shard_bytes: largest file.
    Raises:
        OSError: as the file system says.
    """
    directory = folder / directory_name(step)
    directory.mkdir()
    written = write_files(directory, entries, shard_bytes)
    files = {file: stored for file, (_, stored) in written.items()}
    places = {key: file for file, (keys, _) in written.items() for key in keys}
    tensors = {}
    for entry in entries:
        box = Box((0,) * len(entry.shape), entry.shape)
        stored = StoredBox(box, places[entry.key], entry.key)
        tensors[entry.key] = StoredTensor(DTYPE_NAMES[entry.dtype], entry.shape, (stored,))
    write_text(directory / MANIFEST, Manifest(step, layout, metadata, tensors, files).to_json())
    write_text(folder / LATEST, directory.name + "\n")
    sync_directory(directory)


def write_files(
    folder: Path, entries: Sequence[Entry], shard_bytes: int, hashed: bool = True
) -> dict[str, tuple[list[str], StoredFile]]:
    """Write tensors into files of at most `shard_bytes`, some at a time. Returns the keys in each, and what it is."""
    total = sum(entry.nbytes for entry in entries)
    with log.progress(None, "converting", total, "B") as bar:

        def counted(read: Callable[[], Tensor]) -> Tensor:
            tensor = read()
            bar.update(tensor.nbytes)
            return tensor

        written = {}
        for file, part in _split(entries, shard_bytes).items():
            counting = [replace(entry, read=partial(counted, entry.read)) for entry in part]
            stored = safetensors_file.write(folder / file, counting, hashed)
            written[file] = [entry.key for entry in part], stored
        return written


def _split(entries: Sequence[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """File name -> its tensors, in order."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


@contextmanager
def appearing(output: Path, flag: str) -> Iterator[Path]:
    """A directory to fill, which becomes `output` when all of it is there.

    Raises:
        CheckpointError: the output exists, or cannot be written.
    """
    output = output if output.name else output.absolute()
    if output.is_dir() and candidates(output):
        raise CheckpointError(f"{flag} {output} holds checkpoints", "they are never overwritten", "name another one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{flag} {output} exists", "existing output is never overwritten", "name another one")
    unfinished = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_directory(unfinished)
        unfinished.rename(output)
        sync_directory(output.parent)
    except OSError as error:
        rule = f"the directory must be writable ({error.strerror}: {error.filename or output})"
        fix = "name a directory of your own, or free some space"
        raise CheckpointError(f"cannot write to {flag} {output}", rule, fix) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
