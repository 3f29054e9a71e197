"""`megasp checkpoint verify`: reads every byte of checkpoints, and names the files and tensors that are damaged."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megasp import log
from megasp.checkpoints.manifest import Manifest, candidates, read_manifest, unfinished
from megasp.checkpoints.safetensors_file import problem
from megasp.config.flags import REQUIRED, flag
from megasp.errors import CheckpointError


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
        for sentence in found:
            log.warning(sentence)
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
    found = {directory / name: problem(directory / name, manifest.files[name]) for name in names}
    return [f"{path} {what}" for path, what in found.items() if what] + list(_loose_boxes(directory, manifest))


def _loose_boxes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Tensors that stand in a file that the manifest does not list."""
    for name, tensor in manifest.tensors.items():
        files = {stored.file for stored in tensor.boxes if stored.file is not None} - manifest.files.keys()
        for file in files:
            yield f"{directory} has {name} in {file}, which is not in the manifest's list of files"
