"""`megasp checkpoint verify`: reads every byte of checkpoints, and names the files and tensors that are damaged."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megasp import log
from megasp.checkpoints import safetensors_file
from megasp.checkpoints.manifest import Manifest, candidates, read_manifest, unfinished
from megasp.checkpoints.safetensors_file import StoredFile
from megasp.config.flags import REQUIRED, flag
from megasp.errors import CheckpointError

SHOWN = 3
"""Damaged tensors that are named; of the others only the number is said."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checkpoint verification."""

    path: str = flag(REQUIRED, "directory of checkpoints (all are read), or one step_N in it", name="path")


def run(options: Options) -> int:
    """Print each problem. Exit status 0 without any, else 1."""
    root = Path(options.path)
    directories, count = candidates(root), 0
    if not directories:
        rule = "a checkpoint is a directory such as step_00000100 with a manifest.json"
        raise CheckpointError(f"no checkpoint in {root}", rule, "check the path")
    for left in unfinished(root):
        log.info(f"{left} was never finished: it does not count, and the next save removes it")
    for directory in directories:
        found = damage(directory)
        count += len(found)
        for problem in found:
            log.warning(problem)
        if not found:
            manifest = read_manifest(directory)
            size = sum(file.bytes for file in manifest.files.values())
            log.info(
                f"{directory}: {len(manifest.files)} files, {len(manifest.tensors):,} tensors, {size:,} bytes, "
                "all as they were written"
            )
    return 1 if count else 0


def damage(directory: Path, part: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, a sentence for each damaged file; nothing where it is as it was written.

    Args:
        part: which of its files to read, so that ranks can share the work.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    names = sorted(manifest.files)[part]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(pool.map(lambda name: _file_damage(directory, manifest, name), names))
    return [problem for problem in problems if problem] + list(_loose_boxes(directory, manifest))


def _file_damage(directory: Path, manifest: Manifest, name: str) -> str | None:
    path, expected = directory / name, manifest.files[name]
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                return f"{path} has {size} bytes where the manifest says {expected.bytes}"
            if hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256:
                return None
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    keys = _damaged_keys(path, expected)
    tensors = {
        stored.key: tensor
        for tensor, entry in manifest.tensors.items()
        for stored in entry.boxes
        if stored.file == name
    }
    named = [tensors.get(key, key) for key in keys]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    where = f"damaged: {', '.join(named[:SHOWN])}{more}" if named else "its header, or what no checksum covers"
    return f"{path} does not have the SHA-256 that the manifest says ({where})"


def _damaged_keys(path: Path, expected: StoredFile) -> list[str]:
    """The tensors of a damaged file whose checksum is another one; none where its header cannot tell."""
    try:
        places = safetensors_file.layout(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    keys = []
    with path.open("rb") as file:
        for key, wanted in expected.checksums.items():
            start, stop = places.get(key, (0, 0))
            file.seek(start)
            if safetensors_file.checksum(memoryview(file.read(max(0, stop - start)))) != wanted:
                keys.append(key)
    return keys


def _loose_boxes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Tensors that stand in a file that the manifest does not list."""
    for name, tensor in manifest.tensors.items():
        files = {stored.file for stored in tensor.boxes if stored.file is not None} - manifest.files.keys()
        for file in files:
            yield f"{directory} has {name} in {file}, which is not in the manifest's list of files"
