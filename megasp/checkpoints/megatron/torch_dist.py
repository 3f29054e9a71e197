"""Megatron-LM's `--ckpt-format torch_dist`: PyTorch's distributed checkpoint (DCP), and `common.pt` beside it.

    iter_0000100/metadata.json       {"sharded_backend": "torch_dist", ...}
    iter_0000100/common.pt           args, iteration, the optimizer's settings
    iter_0000100/.metadata           a pickle: each tensor's shape and boxes, and in which file each box is
    iter_0000100/__0_1.distcp        boxes one after the other, each a file of `torch.save` of its own

Layers are stacked there (`decoder.layers.mlp.linear_fc2.weight` is [layers, out, in]) or stand alone
(`decoder.layers.3.mlp.linear_fc2.weight`); both are read as the latter.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasp.checkpoints.megatron.sources import Part, Source, Stored
from megasp.checkpoints.megatron.torch_files import WRITE_AGAIN, read_pickle, read_torch
from megasp.errors import CheckpointError
from megasp.parameters import Box

CONFIG, COMMON, METADATA = "metadata.json", "common.pt", ".metadata"
_STACKED = re.compile(r"(.*\bdecoder\.layers)\.(?!\d)(.+)")
"""Of a tensor that holds all layers."""


def read_torch_dist(directory: Path) -> Stored:
    """What such a checkpoint holds; only its metadata is read.

    Raises:
        CheckpointError: another format, or files that are missing, damaged or name what is not allowed.
    """
    try:
        backend = json.loads((directory / CONFIG).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"it must say which format the checkpoint has ({type(error).__name__})"
        raise CheckpointError(f"{directory / CONFIG} cannot be used", rule, WRITE_AGAIN) from None
    if backend != "torch_dist":
        rule = "megasp reads torch_dist"
        fix = "load it in Megatron-LM, and save it once more with --ckpt-format torch_dist"
        raise CheckpointError(f"{directory} has format {backend}", rule, fix)
    common = read_torch(directory / COMMON)
    metadata = read_pickle(directory / METADATA)
    try:
        sources = {source.key: source for source in _sources(directory, metadata)}
        objects = {key: None for key, entry in _entries(metadata) if not hasattr(entry, "chunks")}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        rule = f"it must be the metadata of a DCP checkpoint ({type(error).__name__}: {error})"
        raise CheckpointError(f"{directory / METADATA} cannot be used", rule, WRITE_AGAIN) from None
    if not isinstance(common, Mapping):
        raise CheckpointError(f"{directory / COMMON} cannot be used", "it must hold Megatron-LM's state", WRITE_AGAIN)
    return Stored(sources, common, objects.keys())


def _entries(metadata: Any) -> Iterator[tuple[str, Any]]:
    """Name -> what the metadata says of each tensor, and of each object."""
    yield from metadata.state_dict_metadata.items()


def _sources(directory: Path, metadata: Any) -> Iterator[Source]:
    places = {
        (index.fqn, tuple(index.offset)): info
        for index, info in metadata.storage_data.items()
        if getattr(index, "offset", None) is not None  # objects have none
    }
    whole = getattr(metadata, "mcore_data", None) or {}
    for key, entry in _entries(metadata):
        if not hasattr(entry, "chunks"):
            continue
        dtype = entry.properties.dtype if hasattr(entry.properties, "dtype") else entry.properties.state[0]
        shape, parts = tuple(entry.size), []
        for chunk in entry.chunks:
            place = places[key, tuple(chunk.offsets)]
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{key} is stored by {place.transform_descriptors}")
            file = _inside(directory, place.relative_path)
            read = partial(_read, file, place.offset, place.offset + place.length, key)
            parts.append(Part(Box(tuple(chunk.offsets), tuple(chunk.sizes)), read))
        global_shape = whole.get(key, {}).get("nd_reformulated_orig_global_shape")
        if global_shape is not None:
            shape, parts = tuple(global_shape), _unflattened(shape, tuple(global_shape), parts)
        yield from _by_layer(Source(key, dtype, shape, tuple(parts)))


def _inside(directory: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{name} is not inside the checkpoint's directory")
    return directory / name


def _read(file: Path, start: int, stop: int, key: str) -> Tensor:
    tensor = read_torch(file, start, stop)
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file} holds no tensor where {key} is", "its metadata says that it does", WRITE_AGAIN)
    return tensor


def _by_layer(source: Source) -> Iterator[Source]:
    """A tensor of all layers as one for each."""
    match = _STACKED.fullmatch(source.key)
    if match is None:
        yield source
        return
    parts: dict[int, list[Part]] = defaultdict(list)
    for part in source.parts:
        first = part.box.start[0]
        for layer in range(first, first + part.box.size[0]):
            read = partial(_layer, part, layer - first)
            parts[layer].append(Part(Box(part.box.start[1:], part.box.size[1:]), read))
    for layer in range(source.shape[0]):
        key = f"{match[1]}.{layer}.{match[2]}"
        yield Source(key, source.dtype, source.shape[1:], tuple(parts[layer]))


def _layer(part: Part, index: int) -> Tensor:
    return part.read()[index]


def _unflattened(shape: tuple[int, ...], whole: tuple[int, ...], pieces: list[Part]) -> list[Part]:
    """The boxes of a tensor that was stored flat, as megatron-core's distributed optimizer did before 0.14.

    Of a tensor [X, Y] in boxes of [x, y] it stored [X / x, Y / y, x * y], and of that ranges along the last dim.
    """
    *grid, numel = shape
    size = tuple(total // count for total, count in zip(whole, grid, strict=True))
    boxes: dict[tuple[int, ...], list[Part]] = defaultdict(list)
    for piece in pieces:
        boxes[piece.box.start[:-1]].append(piece)
    return [
        Part(
            Box(tuple(i * n for i, n in zip(index, size, strict=True)), size),
            partial(_assembled, sorted(flat, key=lambda piece: piece.box.start[-1]), size, numel),
        )
        for index, flat in boxes.items()
    ]


def _assembled(pieces: list[Part], size: tuple[int, ...], numel: int) -> Tensor:
    flat = torch.cat([piece.read().flatten() for piece in pieces])
    if flat.numel() != numel:
        raise CheckpointError(f"a box of {list(size)} has {flat.numel()} elements", f"it needs {numel}", WRITE_AGAIN)
    return flat.view(size)
