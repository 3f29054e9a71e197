"""The checkpoint format: what a directory holds, and how it is found.

    ROOT/latest                                  text: the name of the newest complete checkpoint
    ROOT/step_00000100/rank_00000.safetensors    one per rank that owns something
    ROOT/step_00000100/manifest.json             without it the directory does not count

The manifest is JSON:

    {"format": "megasp-checkpoint", "version": 2, "step": 100, "layout": "tp2-pp1-u1-r1-dp1",
     "metadata": {"config": {...}, ...},
     "files": {"rank_00000.safetensors": {"bytes": 4096, "header": "...", "tensors": {"model/layers.0...": "..."}}},
     "tensors": {"model/layers.0.attention.q.weight": {"dtype": "F32", "shape": [32, 16], "boxes": [
         {"start": [0, 0], "size": [16, 16], "file": "rank_00000.safetensors", "key": "model/layers.0..."}, ...]}, ...},
     "sha256": "..."}

The boxes of a tensor tile it: each element stands in exactly one of them. Of a file there is the SHA-256 of its header
(with the length before it) and of each tensor in it: together every byte. `sha256` is that of the manifest's text
without it, so the manifest is as safe against damage as the files are. Nothing in the format is pickled.
Version 1 had the SHA-256 of a file's bytes in one, `sha256`, in the place of `header` and `tensors`; it is read.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megasp.checkpoints.safetensors_file import StoredFile
from megasp.errors import CheckpointError
from megasp.parameters import Box, Piece

FORMAT, VERSION, READ_VERSIONS = "megasp-checkpoint", 2, (1, 2)
MANIFEST, LATEST = "manifest.json", "latest"
HASH_FOLLOWS = ', "sha256": "'
"""Ends the manifest, with the SHA-256 of the text up to here and `}`, and `"}`."""
_DIRECTORY = re.compile(r"step_(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class Shard:
    """One local tensor of this rank and what it is made of.

    Attributes:
        kind: "model", "exp_avg" or "exp_avg_sq" (AdamW's moments); a piece is stored as `kind/name`.
        tensor: the local tensor; saved from, or loaded into.
        pieces: its pieces, stacked along dim 0.
        owner: False where another rank (a data-parallel replica) writes the same boxes.
    """

    kind: str
    tensor: Tensor
    pieces: tuple[Piece, ...]
    owner: bool = True


@dataclass(frozen=True)
class StoredBox:
    """Where a box of a canonical tensor stands: under `key` in `file`.

    Hugging Face's files, but never ours, may hold it within a larger tensor, from `row` on, and `transposed` after
    that; and what is in no file (None) is zeros.
    """

    box: Box
    file: str | None
    key: str
    row: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor: safetensors' name of its dtype, its global shape, and the boxes that tile it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: steps trained.
        layout: name of the layout that wrote it.
        metadata: what the caller of `save` gave: config, data position, RNG, versions.
        tensors: by `kind/name`.
        files: by name in the checkpoint's directory.
    """

    step: int
    layout: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    def to_json(self) -> str:
        """The text of `manifest.json`, which `read_manifest` reads back."""
        tensors = {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "boxes": [
                    {"start": stored.box.start, "size": stored.box.size, "file": stored.file, "key": stored.key}
                    for stored in tensor.boxes
                ],
            }
            for name, tensor in self.tensors.items()
        }
        document = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "layout": self.layout,
            "metadata": self.metadata,
            "files": {
                name: {fact: value for fact, value in asdict(file).items() if value}
                for name, file in self.files.items()
            },
            "tensors": tensors,
        }
        text = json.dumps(document)
        return text[:-1] + HASH_FOLLOWS + _fingerprint(text) + '"}'

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The inverse of `to_json`.

        Raises:
            ValueError: it is not a manifest, of another version, or damaged; in words.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it does not say format {FORMAT}")
        if document.get("version") not in READ_VERSIONS:
            known = " and ".join(map(str, READ_VERSIONS))
            raise ValueError(f"it has version {document.get('version')} and this megasp reads versions {known}")
        before, _, after = text.rpartition(HASH_FOLLOWS)
        if after != _fingerprint(before + "}") + '"}':
            raise ValueError("its content does not match its own hash")
        tensors = {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), tuple(map(_stored_box, entry["boxes"])))
            for name, entry in document["tensors"].items()
        }
        files = {name: _stored_file(file) for name, file in document["files"].items()}
        outside = [name for name in files if Path(name).name != name]
        if outside:
            raise ValueError(f"its file {outside[0]} is not inside the checkpoint's directory")
        return cls(document["step"], document["layout"], document["metadata"], tensors, files)


def _stored_box(entry: Mapping[str, Any]) -> StoredBox:
    return StoredBox(Box(tuple(entry["start"]), tuple(entry["size"])), entry["file"], entry["key"])


def _stored_file(entry: Mapping[str, Any]) -> StoredFile:
    """Version 1 had sums of the tensors' words beside the hash, which are not looked at."""
    return StoredFile(**{name: value for name, value in entry.items() if name != "checksums"})


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


Part = tuple[dict[str, StoredTensor], dict[str, StoredFile]]
"""Tensors and files that one rank wrote."""


def merge(parts: Sequence[Part]) -> Part:
    """Tensors and files of all ranks, from those of each.

    Raises:
        ValueError: ranks disagree about a tensor, or their boxes do not add up to it.
    """
    facts: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, list[StoredBox]] = {}
    files: dict[str, StoredFile] = {}
    for tensors, own_files in parts:
        files |= own_files
        for name, tensor in tensors.items():
            found = facts.setdefault(name, (tensor.dtype, tensor.shape))
            if found != (tensor.dtype, tensor.shape):
                raise ValueError(f"{name} is {found} on one rank and {(tensor.dtype, tensor.shape)} on another")
            boxes.setdefault(name, []).extend(tensor.boxes)
    for name, stored in boxes.items():
        written, needed = sum(part.box.numel for part in stored), math.prod(facts[name][1])
        if written != needed:
            raise ValueError(f"the ranks together hold {written} elements of {name}, which has {needed}")
    return {name: StoredTensor(*facts[name], tuple(stored)) for name, stored in boxes.items()}, files


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def find_latest(root: Path | str) -> Path | None:
    """The checkpoint that `root/latest` names, or the one of the highest step where that is missing or not complete.

    `root` may be a checkpoint itself. None when there is none.

    Raises:
        CheckpointError: the directory may not be read.
    """
    try:
        return _find_latest(Path(root))
    except OSError as error:
        rule = f"the directory must be readable ({error.strerror})"
        raise CheckpointError(f"--load {root}", rule, "check its permissions") from None


def _find_latest(root: Path) -> Path | None:
    return next(iter(candidates(root)), None)


def candidates(root: Path) -> list[Path]:
    """The complete checkpoints of a directory (or the one that it is) in the order in which they are worth loading: the
    one that `latest` names and those before it, the newest first; then any newer ones.

    Raises:
        OSError: the directory may not be read.
    """
    if (root / MANIFEST).is_file():
        return [root]
    if not root.is_dir():
        return []
    matches = filter(None, (_DIRECTORY.fullmatch(path.name) for path in root.iterdir()))
    by_step = sorted(matches, key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    complete = [match[0] for match in by_step if (root / match[0] / MANIFEST).is_file()]
    latest = root / LATEST
    named = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    newer = complete.index(named) if named in complete else 0
    return [root / name for name in complete[newer:] + complete[:newer]]


def unfinished(root: Path) -> list[Path]:
    """What saves that were killed left in a directory of checkpoints."""
    if not root.is_dir() or (root / MANIFEST).is_file():
        return []
    partial = root.glob(".step_*.partial")
    return sorted(
        [*partial, *(path for path in root.glob("step_*") if path.is_dir() and not (path / MANIFEST).is_file())]
    )


def step_of(directory: Path) -> int:
    """The step that one of `candidates` is named after."""
    match = _DIRECTORY.fullmatch(directory.name)
    assert match, directory
    return int(match[1])


def resolve(root_or_dir: Path | str) -> Path:
    """The checkpoint's directory that a --load path means.

    Raises:
        CheckpointError: there is none.
    """
    found = find_latest(root_or_dir)
    if found is None:
        rule = f"a complete one is a directory such as {directory_name(100)} with a {MANIFEST}"
        raise CheckpointError(f"no checkpoint in {root_or_dir}", rule, "check --load")
    return found


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a checkpoint's directory.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    path = Path(directory) / MANIFEST
    try:
        return Manifest.from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        rule = "a checkpoint counts only with its manifest"
        raise CheckpointError(f"{path} is missing", rule, "load another one") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", str(error.strerror), "check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"it must be the manifest of a megasp checkpoint, but {error}"
        raise CheckpointError(f"{path} cannot be used", rule, "copy it again or load an earlier checkpoint") from None
