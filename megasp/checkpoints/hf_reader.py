"""A Hugging Face model's directory read as a checkpoint: a manifest is made of its headers, and nothing is copied.

Each rank then reads the boxes that it holds straight from the safetensors, as from a checkpoint of ours.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megasp.checkpoints.hf_names import Shape, stack
from megasp.checkpoints.manifest import Manifest, StoredBox, StoredTensor
from megasp.checkpoints.safetensors_file import StoredFile
from megasp.checkpoints.whole_tensors import WEIGHTS
from megasp.config.hf_config import config_of, read
from megasp.config.hf_families import Family
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError
from megasp.model import Factory, GPTModel
from megasp.parallel_state import ParallelState
from megasp.parameters import Box

INDEX = "model.safetensors.index.json"
DOWNLOAD = "download the model again"
VOCABULARY = ("embedding.weight", "head.weight")


def read_hugging_face(directory: Path | str, model: ModelConfig | None = None) -> Manifest:
    """The manifest of a Hugging Face model.

    Args:
        model: that it is loaded into: with more rows of the vocabulary than there are, these are zeros.
    Raises:
        CheckpointError: no such model, one that is not served, files or tensors missing, or too many.
    """
    directory = Path(directory)
    family, values = read(config_of(directory))
    theirs = ModelConfig(**values)
    given, rows = canonical_shapes(theirs), theirs.padded_vocab_size
    if model is not None and model.padded_vocab_size > rows:
        theirs = dataclasses.replace(theirs, vocab_size=model.padded_vocab_size)
    tensors, files = _stored(directory, family)
    found: dict[str, StoredTensor] = {}
    for stacked in stack(family, given):
        if stacked.key not in tensors:
            rule = f"every {family.architecture} has it"
            raise CheckpointError(f"{directory} has no tensor {stacked.key}", rule, DOWNLOAD)
        file, key, dtype, shape = tensors.pop(stacked.key)
        if shape != stacked.shape:
            rule = f"by config.json it must be {list(stacked.shape)}"
            raise CheckpointError(f"{stacked.key} in {directory} is {list(shape)}", rule, DOWNLOAD)
        row = 0
        for name, part in stacked.parts:
            box = StoredBox(Box((0,) * len(part), part), file, key, row, stacked.transposed)
            found[f"model/{name}"] = StoredTensor(dtype, part, (box,))
            row += part[0]
    tied = {} if theirs.untie_embeddings_and_output_weights else {"lm_head.weight"}
    extra = [key for key in tensors if key not in tied and not key.endswith(family.ignored)]
    if extra:
        rule = f"{family.architecture} has none such"
        raise CheckpointError(
            f"{directory} has a tensor {extra[0]}", rule, "only models of the plain architecture convert"
        )
    metadata = {"config": {"model": dataclasses.asdict(theirs)}, "source": str(directory), "has_optimizer": False}
    metadata["model_type"] = family.model_type
    return Manifest(0, family.architecture, metadata, _padded(found, theirs.padded_vocab_size), files)


def canonical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every canonical tensor of a model, in order; nothing is allocated."""
    whole = GPTModel(model, ParallelState.single(), factory=Factory("meta"))
    return {piece.name: piece.shape for p in whole.parameters() for piece in p.pieces}  # type: ignore[attr-defined]


def _padded(tensors: dict[str, StoredTensor], rows: int) -> dict[str, StoredTensor]:
    """The same with `rows` rows of the vocabulary, of which those that are not stored are zeros."""
    for name in (f"model/{name}" for name in VOCABULARY):
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape[0] < rows:
            there, width = tensor.shape
            zeros = StoredBox(Box((there, 0), (rows - there, width)), None, "")
            tensors[name] = StoredTensor(tensor.dtype, (rows, width), (*tensor.boxes, zeros))
    return tensors


Stored = tuple[str, str, str, Shape]
"""File, key in it, dtype and shape of a tensor."""


def _stored(directory: Path, family: Family) -> tuple[dict[str, Stored], dict[str, StoredFile]]:
    """Every tensor of the directory by its full name, and the files that they are in."""
    weight_map = _weight_map(directory)
    tensors: dict[str, Stored] = {}
    files: dict[str, StoredFile] = {}
    for file in dict.fromkeys(weight_map.values()):
        path = inside(directory, file)
        try:
            files[file] = StoredFile(path.stat().st_size)
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    full = key if key.startswith((family.prefix, "lm_head.")) else family.prefix + key
                    tensors[full] = file, key, header.get_dtype(), tuple(header.get_shape())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read", str(error.strerror or error), DOWNLOAD) from None
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} cannot be read", f"it must be whole safetensors ({error})", DOWNLOAD
            ) from None
    stored = {key for _, key, _, _ in tensors.values()}
    lost = [key for key in weight_map if key and key not in stored]
    if lost:
        rule = f"{INDEX} says that it is in {weight_map[lost[0]]}"
        raise CheckpointError(f"{directory} has no tensor {lost[0]}", rule, DOWNLOAD)
    return tensors, files


def _weight_map(directory: Path) -> Mapping[str, str]:
    """Tensor -> file, from the index; one file without an index."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            pickled = any(directory.glob("pytorch_model*.bin"))
            rule = "weights are read from safetensors alone" + (
                ": .bin files are pickles, which run code" if pickled else ""
            )
            fix = "convert it by transformers' save_pretrained" if pickled else "check the path"
            raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {INDEX}", rule, fix)
        return {"": WEIGHTS}
    try:
        document: Any = json.loads(index.read_text("utf-8"))
        return {str(key): str(file) for key, file in document["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} cannot be read", f"it must map tensors to files ({error})", DOWNLOAD) from None


def inside(directory: Path, name: str) -> Path:
    """The path of a file of a model, which must not lead elsewhere: but Hugging Face's cache links to its own blobs.

    Raises:
        CheckpointError: it leaves the directory.
    """
    home, path = directory.resolve(), (directory / name).resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (path.is_relative_to(home) or path.is_relative_to(cache)) or Path(name).is_absolute():
        rule = "a model's files must be inside its directory"
        raise CheckpointError(f"{directory / name} is {path}", rule, "copy the file there, or remove it")
    return path
