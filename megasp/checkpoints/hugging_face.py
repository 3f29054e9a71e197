"""Conversion between checkpoints and Hugging Face models, a tensor at a time.

    to_hf     canonical tensors -> theirs: renamed, fused, transposed; with config.json, generation config, tokenizer
    from_hf   the same tables the other way, into a checkpoint of weights alone

What a family is stands in `megasp.config.hf_families`. Written for transformers 4.56 and later.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasp import log
from megasp.checkpoints.hf_names import Stacked, stack
from megasp.checkpoints.hf_reader import INDEX, read_hugging_face
from megasp.checkpoints.hf_tokenizer import GENERATION, carry, write_tokenizer
from megasp.checkpoints.manifest import directory_name, resolve
from megasp.checkpoints.reader import CheckpointReader, saved_model
from megasp.checkpoints.safetensors_file import DTYPES as STORED_DTYPES
from megasp.checkpoints.safetensors_file import Entry
from megasp.checkpoints.whole_tensors import SHARD_BYTES, appearing, write_checkpoint, write_files
from megasp.config.flags import build
from megasp.config.hf_config import family_of, write
from megasp.config.hf_families import FAMILIES
from megasp.config.schema import Config, DataConfig, ModelConfig
from megasp.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CARRIED = "hugging_face"
"""Directory in a converted checkpoint's root with the files that go back with it: tokenizer, generation config."""


def to_hf(
    checkpoint: Path | str,
    output: Path | str,
    dtype: str | None = None,
    tokenizer_model: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    model_type: str | None = None,
) -> Path:
    """Write the model of a checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` loads.

    A few tensors are in memory at a time. The output appears when it is complete.

    Args:
        checkpoint: a directory of checkpoints (the latest is taken), or one of them.
        dtype: "bf16", "fp16" or "fp32"; the compute dtype of the run without it.
        tokenizer_model: tokenizer.json or its directory; the one that the run named without it.
        shard_bytes: largest file of weights.
        model_type: of the family to write; without it that of the model it was converted from, else the first that can
            say it.
    Returns:
        The output directory.
    Raises:
        CheckpointError: nothing to read, a model outside the families, or an output that exists or cannot be written.
        DataError: the tokenizer is not there.
    """
    reader = CheckpointReader(resolve(checkpoint))
    model = saved_model(reader.manifest)
    if model is None:
        rule = "its manifest must hold the run's config"
        raise CheckpointError(f"{reader.directory} does not say what model it is", rule, "save it by `megasp pretrain`")
    config = reader.manifest.metadata["config"]
    training = config.get("training", {})
    length = _positions(model, training.get("seq_length") or 0)
    came_from = reader.manifest.metadata.get("model_type")
    families = sorted(FAMILIES, key=lambda family: family.model_type != came_from)  # stable
    asked = [family for family in families if family.model_type == model_type]
    family, said = family_of(model, length, asked or families)
    torch_dtype = DTYPES[dtype or next((name for name in ("bf16", "fp16") if training.get(name)), "fp32")]
    names = (name for name in reader.manifest.tensors if name.startswith("model/"))
    stacked = stack(family, {name.removeprefix("model/"): reader.manifest.tensors[name].shape for name in names})
    data = build(DataConfig, config.get("data", {}))
    with appearing(Path(output), "--output") as folder:
        eod = write_tokenizer(folder, data, model.vocab_size, tokenizer_model, length)
        ids = _token_ids(folder, eod)
        dtype_name = str(torch_dtype).removeprefix("torch.")
        _write_json(folder / "config.json", write(family, said, length) | {"torch_dtype": dtype_name} | ids)
        if not (folder / GENERATION).is_file():
            _write_json(folder / GENERATION, {"_from_model_config": True} | ids)
        entries = [Entry(t.key, torch_dtype, t.shape, partial(_read, reader, t, torch_dtype)) for t in stacked]
        files = write_files(folder, entries, shard_bytes, hashed=False)
        if len(files) > 1:
            weight_map = {key: file for file, (part, _) in files.items() for key in part}
            total = sum(entry.nbytes for entry in entries)
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return Path(output)


def from_hf(source: Path | str, save: Path | str, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a Hugging Face model as a checkpoint of weights alone, for `--load DIR --finetune` in any layout.

    Args:
        source: directory with config.json and safetensors.
        save: directory of checkpoints to write; it must hold none.
        dtype: "bf16", "fp16" or "fp32"; that of the files without it.
    Returns:
        The checkpoint's directory.
    Raises:
        CheckpointError: a model that cannot be read or is not served, or an output that exists or cannot be written.
    """
    source, root = Path(source), Path(save)
    manifest = read_hugging_face(source)
    model = saved_model(manifest)
    assert model is not None
    reader = CheckpointReader(source, verify_hashes=False, manifest=manifest)
    entries = []
    for name, tensor in manifest.tensors.items():
        torch_dtype = DTYPES[dtype] if dtype else STORED_DTYPES[tensor.dtype]
        own = Stacked(name, ((name.removeprefix("model/"), tensor.shape),))
        entries.append(Entry(name, torch_dtype, tensor.shape, partial(_read, reader, own, torch_dtype)))
    with appearing(root, "--save") as folder:
        (folder / CARRIED).mkdir()
        data = carry(source, folder / CARRIED, root / CARRIED)
        if not data:
            log.info(f"{source} has no tokenizer.json: give --tokenizer-model where one is needed")
        config = Config(model=model, data=build(DataConfig, data))
        dtypes = {entry.dtype for entry in entries}
        bf16, fp16 = (dtypes == {half} for half in (torch.bfloat16, torch.float16))
        length = _positions(model, 0)
        config = replace(config, training=replace(config.training, bf16=bf16, fp16=fp16, seq_length=length))
        metadata = manifest.metadata | {"config": asdict(config)}
        write_checkpoint(folder, 0, manifest.layout, metadata, entries, shard_bytes)
    return root / directory_name(0)


def _positions(model: ModelConfig, seq_length: int) -> int:
    """Positions that the model is made for; of learned ones there are exactly so many."""
    if model.position_embedding_type == "learned_absolute":
        return model.max_position_embeddings or 1024
    return max(model.max_position_embeddings or 0, seq_length) or 2048


def _token_ids(folder: Path, eod: int | None) -> dict[str, Any]:
    """bos and eos, as the generation config says that came along, or as the tokenizer does."""
    carried = json.loads((folder / GENERATION).read_text("utf-8")) if (folder / GENERATION).is_file() else {}
    return {key: carried.get(key, eod) for key in ("bos_token_id", "eos_token_id")}


def _read(reader: CheckpointReader, stacked: Stacked, dtype: torch.dtype) -> Tensor:
    """One tensor of Hugging Face's, of the canonical ones in it; nothing is copied that need not be."""
    parts = [reader.whole(f"model/{name}").to(dtype) for name, _ in stacked.parts]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.t() if stacked.transposed else out


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
