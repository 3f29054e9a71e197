"""Checkpoints as Hugging Face models: one table per family, read one tensor at a time.

A canonical tensor is one of Hugging Face's under another name, so a family is two things: the names, and what its
config.json says. Written for transformers 4.56 and later.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasp import log
from megasp.checkpoints import safetensors_file
from megasp.checkpoints.manifest import resolve
from megasp.checkpoints.reader import CheckpointReader, saved_model
from megasp.checkpoints.safetensors_file import Entry
from megasp.config.flags import build
from megasp.config.schema import DataConfig, ModelConfig
from megasp.data import HuggingFaceTokenizer, build_tokenizer
from megasp.errors import CheckpointError
from megasp.model.rotary import LLAMA3_HIGH_FREQUENCY_FACTOR, LLAMA3_LOW_FREQUENCY_FACTOR, LLAMA3_ORIGINAL_CONTEXT
from megasp.parameters import Box

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "layers.N.input_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.q": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.k": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.v": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.o": "model.layers.N.self_attn.o_proj",
    "layers.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.mlp.gate": "model.layers.N.mlp.gate_proj",
    "layers.N.mlp.up": "model.layers.N.mlp.up_proj",
    "layers.N.mlp.down": "model.layers.N.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
"""Module names, N a layer; `.weight` and `.bias` stay as they are."""


def _llama_model(reader: CheckpointReader) -> ModelConfig:
    """The checkpoint's model.

    Raises:
        CheckpointError: LlamaForCausalLM cannot compute it; names the first flag that is in the way.
    """
    model = saved_model(reader.manifest)
    if model is None:
        rule = "its manifest must hold the run's config"
        raise CheckpointError(f"{reader.directory} does not say what model it is", rule, "save it by `megasp pretrain`")
    rules = (
        (model.normalization == "RMSNorm", f"--normalization {model.normalization}", "RMSNorm"),
        (model.position_embedding_type == "rope", f"--position-embedding-type {model.position_embedding_type}", "rope"),
        (model.rotary_percent == 1, f"--rotary-percent {model.rotary_percent}", "rotation of all channels"),
        (model.swiglu, "an MLP without --swiglu", "a SwiGLU MLP"),
        (model.qkv_bias == model.add_bias_linear, "--add-qkv-bias", "biases in all linear layers or none"),
        (not model.qk_layernorm, "--qk-layernorm", "no norm of queries and keys"),
        (model.window_size is None, f"--window-size {model.window_size}", "attention without a window"),
    )
    for fits, got, rule in rules:
        if not fits:
            fix = "only Llama-shaped models are exported; keep this one in megasp"
            raise CheckpointError(f"the checkpoint's model has {got}", f"the Llama family has {rule}", fix)
    return model


def llama_name(name: str) -> str:
    """`layers.3.attention.q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    module, _, kind = name.rpartition(".")
    layer, pattern = re.search(r"\d+", module), re.sub(r"\d+", "N", module)
    if pattern not in LLAMA_NAMES:
        fix = "only Llama-shaped models are exported"
        raise CheckpointError(f"the checkpoint has a tensor {name}", "the Llama family has none such", fix)
    return LLAMA_NAMES[pattern].replace("N", layer[0] if layer else "") + "." + kind


def llama_config(model: ModelConfig, max_positions: int, dtype: torch.dtype, eos_id: int | None) -> dict[str, Any]:
    """config.json. Rotary settings stand there twice: as transformers 5 writes them and as 4 reads them."""
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": "default"}
    if model.use_rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": LLAMA3_LOW_FREQUENCY_FACTOR,
            "high_freq_factor": LLAMA3_HIGH_FREQUENCY_FACTOR,
            "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.use_rope_scaling else None,
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.add_bias_linear,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
    }


def to_hf(
    checkpoint: Path | str,
    output: Path | str,
    dtype: str | None = None,
    tokenizer_model: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model of a checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` loads.

    One tensor is in memory at a time. The output appears when it is complete.

    Args:
        checkpoint: a directory of checkpoints (the latest is taken), or one of them.
        dtype: "bf16", "fp16" or "fp32"; the compute dtype of the run without it.
        tokenizer_model: tokenizer.json or its directory; the one that the run named without it.
        shard_bytes: largest file of weights.
    Returns:
        The output directory.
    Raises:
        CheckpointError: nothing to read, a model outside the family, or an output that exists or cannot be written.
        DataError: the tokenizer is not there.
    """
    reader = CheckpointReader(resolve(checkpoint))
    config = reader.manifest.metadata.get("config", {})
    model = _llama_model(reader)
    training = config.get("training", {})
    torch_dtype = DTYPES[dtype or next((name for name in ("bf16", "fp16") if training.get(name)), "fp32")]
    data = build(DataConfig, config.get("data", {}))
    max_positions = model.max_position_embeddings or training.get("seq_length") or 2048
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output {output} exists", "existing output is never overwritten", "name another one")
    unfinished = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        eos_id = _write_tokenizer(unfinished, data, tokenizer_model, max_positions)
        _write_json(unfinished / "config.json", llama_config(model, max_positions, torch_dtype, eos_id))
        ids = {"bos_token_id": eos_id, "eos_token_id": eos_id}
        _write_json(unfinished / "generation_config.json", {"_from_model_config": True} | ids)
        _write_weights(unfinished, reader, torch_dtype, shard_bytes)
        unfinished.rename(output)
    except OSError as error:
        rule = f"the directory must be writable ({error.strerror}: {error.filename or output})"
        fix = "name a directory of your own, or free some space"
        raise CheckpointError(f"cannot write to --output {output}", rule, fix) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _write_weights(folder: Path, reader: CheckpointReader, dtype: torch.dtype, shard_bytes: int) -> None:
    """All tensors of the model in safetensors files of at most `shard_bytes` (or one tensor), with an index if many."""
    shapes = {name: tensor.shape for name, tensor in reader.manifest.tensors.items() if name.startswith("model/")}
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    with log.progress(None, "converting", total, "B") as bar:

        def read(name: str) -> Tensor:
            out = torch.empty(shapes[name], dtype=dtype)
            reader.read(name, Box((0,) * out.dim(), shapes[name]), out)
            bar.update(out.nbytes)
            return out

        entries = [
            Entry(llama_name(name.removeprefix("model/")), dtype, shape, partial(read, name))
            for name, shape in shapes.items()
        ]
        files = _split(entries, shard_bytes)
        for file, part in files.items():
            safetensors_file.write(folder / file, part)
    if len(files) > 1:
        weight_map = {entry.key: file for file, part in files.items() for entry in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


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
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_tokenizer(folder: Path, data: DataConfig, tokenizer_model: str | None, max_positions: int) -> int | None:
    """Carry the run's tokenizer files along. Returns the id that ends a document, None where nobody says.

    megasp starts no document with a token of its own, so the end of the one before serves as bos, as in GPT-2.
    """
    path = tokenizer_model or data.tokenizer_model
    if path is None:
        return build_tokenizer(data.tokenizer_type).eod if data.tokenizer_type == "ByteTokenizer" else None
    from tokenizers import Tokenizer

    eod = HuggingFaceTokenizer(path).eod
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    shutil.copyfile(file, folder / "tokenizer.json")
    for name in TOKENIZER_FILES:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), folder / name)
    token = Tokenizer.from_file(str(file)).id_to_token(eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,  # decoding gives back the text as it was
    }
    own = file.with_name("tokenizer_config.json")
    if own.is_file():
        config = json.loads(own.read_text("utf-8"))
    _write_json(folder / "tokenizer_config.json", {"eos_token": token} | config)
    return eod


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
