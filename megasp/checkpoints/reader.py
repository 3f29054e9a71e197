"""Load a checkpoint into any layout: each piece is filled from the stored boxes that it meets.

    stored, tensor 2           wanted, tensor 3
    rank 0  rows  0..12        rank 0  rows  0..8     from rank_00000
    rank 1  rows 12..24        rank 1  rows  8..16    from rank_00000 and rank_00001
                               rank 2  rows 16..24    from rank_00001

Only what is needed is read, straight into its place; a file that is read is checked against its hashes first.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasp import log
from megasp.checkpoints.manifest import Manifest, Shard, StoredBox, StoredTensor, read_manifest, resolve
from megasp.checkpoints.safetensors_file import DTYPES, problem
from megasp.config.flags import build, option_string
from megasp.config.load import todays_names
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError
from megasp.parameters import Box, Piece, placed

COPY_AGAIN = "copy it again or load an earlier checkpoint"

SAME_MODEL = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_heads",
    "head_dim",
    "mlp_size",
    "padded_vocab_size",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "squared_relu",
    "add_bias_linear",
    "qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
)
"""Attributes of `ModelConfig` that make another model: other tensors, or another function of the same ones."""

MAY_CHANGE = (
    "rotary_base",
    "rotary_percent",
    "rotary_scaling",
    "rotary_factor",
    "rotary_original_context",
    "norm_epsilon",
    "window_size",
    "attention_sinks",
)
"""Attributes that a run may change on purpose, as to continue at longer context: said, not refused."""


class CheckpointReader:
    """Reads boxes of canonical tensors from a checkpoint's directory. Opens and checks each file once.

    Args:
        directory: of one checkpoint.
        verify_hashes: read every file that is opened once more, before, to check its hashes.
        manifest: of the directory, if it has no `manifest.json` of its own.
    """

    def __init__(self, directory: Path, verify_hashes: bool = True, manifest: Manifest | None = None) -> None:
        self.directory = directory
        self.manifest = manifest or read_manifest(directory)
        self.verify_hashes = verify_hashes
        self._files: dict[str, Any] = {}
        self._opening = threading.Lock()  # conversion reads in several threads

    def stored(self, kind: str, piece: Piece) -> StoredTensor:
        """What the checkpoint has under `kind/name`.

        Raises:
            CheckpointError: nothing, or a tensor of another shape or of a dtype unknown here.
        """
        name = f"{kind}/{piece.name}"
        tensor = self.manifest.tensors.get(name)
        if tensor is None and kind != "model" and not any(key.startswith(f"{kind}/") for key in self.manifest.tensors):
            rule = "it was saved without the optimizer's state"
            raise CheckpointError(f"{self.directory} holds no {kind}", rule, "add --no-load-optim or --finetune")
        if tensor is None or tensor.shape != piece.shape:
            shapes = f"{list(tensor.shape)} there and {list(piece.shape)} here" if tensor else "missing"
            raise CheckpointError(
                f"{self.directory} is a checkpoint of another model ({name} is {shapes})",
                "every tensor of the model must be there with its shape",
                f"use the flags of its run, such as {_model_flags(self.manifest)}",
            )
        if tensor.dtype not in DTYPES:
            rule = f"megasp reads {', '.join(DTYPES)}"
            raise CheckpointError(f"{name} in {self.directory} has dtype {tensor.dtype}", rule, "use a newer megasp")
        return tensor

    def read(self, name: str, box: Box, out: Tensor) -> None:
        """Fill `out`, of the shape `box.size`, with that box of the tensor `kind/name`.

        Raises:
            CheckpointError: a file is missing or damaged, or the stored boxes do not cover `box`.
        """
        filled = 0
        for stored in self.manifest.tensors[name].boxes:
            common = stored.box.intersect(box)
            if common is None:
                continue
            out[common.relative_to(box.start).slices].copy_(self._source(stored, common))
            filled += common.numel
        if filled != box.numel:
            rule = f"its boxes give {filled} of {box.numel} elements from {box.start}"
            raise CheckpointError(f"{name} in {self.directory} is not whole", rule, COPY_AGAIN)

    def whole(self, name: str) -> Tensor:
        """The tensor `kind/name`: a view of the file's mapping, not to be written to, where it is stored in one piece.

        Raises:
            CheckpointError: as `read`.
        """
        tensor = self.manifest.tensors[name]
        box = Box((0,) * len(tensor.shape), tensor.shape)
        if len(tensor.boxes) == 1 and tensor.boxes[0].box == box:
            return self._source(tensor.boxes[0], box).expand(tensor.shape)
        out = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        self.read(name, box, out)
        return out

    def _source(self, stored: StoredBox, wanted: Box) -> Tensor:
        """The elements of a box within a stored one."""
        if stored.file is None:
            return torch.zeros(())
        file, (rows, *others) = self._file(stored.file), wanted.relative_to(stored.box.start).slices
        slices = (slice(rows.start + stored.row, rows.stop + stored.row), *others)
        try:
            source: Tensor = file.get_slice(stored.key)[slices[::-1] if stored.transposed else slices]
        except (SafetensorError, IndexError) as error:
            raise self._damaged(stored.file, f"cannot give {stored.key} ({error})") from None
        return source.t() if stored.transposed else source

    def _file(self, name: str) -> Any:
        with self._opening:
            if name not in self._files:
                self._check(name)
                try:
                    self._files[name] = safe_open(self.directory / name, "pt")
                except SafetensorError as error:
                    raise self._damaged(name, f"is no safetensors file ({error})") from None
            return self._files[name]

    def _check(self, name: str) -> None:
        """Compare a file with the manifest: it exists, has its size and, if asked for, its hashes."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise self._damaged(name, "is not in the manifest's list of files")
        what = problem(self.directory / name, expected, self.verify_hashes)
        if what:
            raise self._damaged(name, what)

    def _damaged(self, name: str, what: str) -> CheckpointError:
        rule = "every file must be as it was written"
        return CheckpointError(f"{self.directory / name} {what}", rule, COPY_AGAIN)


@torch.no_grad()
def load(
    root_or_dir: Path | str, shards: Sequence[Shard], verify_hashes: bool = True, manifest: Manifest | None = None
) -> Manifest:
    """Fill the shards' tensors in place from a checkpoint of any layout, bit for bit where dtypes are equal.

    Only tensors of kind "model" may have another floating dtype than the checkpoint.

    Args:
        root_or_dir: a directory of checkpoints (the latest is taken), or one checkpoint.
        shards: what this rank holds; `owner` and replicas do not matter here.
        manifest: of a directory without one of its own.
    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another model. All names, shapes and dtypes are
            checked before the first tensor is changed.
    """
    reader = CheckpointReader(Path(root_or_dir) if manifest else resolve(root_or_dir), verify_hashes, manifest)
    for shard in shards:
        for piece in shard.pieces:
            _check_dtype(shard, piece, reader.stored(shard.kind, piece).dtype)
    for shard in shards:
        for piece, local in placed(shard.pieces):
            reader.read(f"{shard.kind}/{piece.name}", piece.box, shard.tensor[local.slices])
    return reader.manifest


def _check_dtype(shard: Shard, piece: Piece, stored: str) -> None:
    here, there = shard.tensor.dtype, DTYPES[stored]
    convertible = shard.kind == "model" and here.is_floating_point and there.is_floating_point
    if here != there and not convertible:
        raise CheckpointError(
            f"{shard.kind}/{piece.name} is {there} in the checkpoint and {here} here",
            "the optimizer's state is resumed bit for bit",
            "use the precision flags of its run, or add --no-load-optim",
        )


def saved_model(manifest: Manifest) -> ModelConfig | None:
    """The model's configuration in the checkpoint's metadata, None if the caller of `save` gave none."""
    values = manifest.metadata.get("config", {}).get("model")
    return build(ModelConfig, todays_names(values)) if isinstance(values, Mapping) else None


def check_same_model(manifest: Manifest, model: ModelConfig) -> None:
    """Refuse a checkpoint of another model by its configuration: one with more layers would load, tensor by tensor.

    Warns of another rotary embedding or epsilon.

    Raises:
        CheckpointError: names the first attribute that differs.
    """
    saved = saved_model(manifest)
    if saved is None:
        return
    for name in (*SAME_MODEL, *MAY_CHANGE):
        there, here = getattr(saved, name), getattr(model, name)
        if there == here:
            continue
        if name in MAY_CHANGE:
            log.warning(f"{name} was {there} in the checkpoint's run and is {here} now")
            continue
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} is of another model ({name} is {there} there and {here} here)",
            "it must be the model that is trained",
            f"use the flags of its run: {_model_flags(manifest)}",
        )


def _model_flags(manifest: Manifest) -> str:
    """The flags that make the checkpoint's model."""
    saved = saved_model(manifest)
    if saved is None:
        return "--num-layers, --hidden-size, --num-attention-heads, --ffn-hidden-size and --vocab-size"
    given = {field: getattr(saved, field.name) for field in fields(saved)}
    changed = {option_string(field): value for field, value in given.items() if value != field.default}
    return " ".join(flag if isinstance(value, bool) else f"{flag} {value}" for flag, value in changed.items())
