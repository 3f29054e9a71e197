"""A checkpoint of Megatron-LM's as ours: weights, moments, step, samples and settings, a tensor at a time.

    find       iter_0000100, by latest_checkpointed_iteration.txt
    read       names and boxes of its tensors, its settings; nothing of it is run
    match      each canonical tensor of the model with its rows there; what is missing or too much is refused
    write      tensor by tensor, and config.yaml with the run's settings in our flags

The moments are bit for bit what they were, and so are the weights: the fp32 masters where there are some.
"""

import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasp import __version__
from megasp.checkpoints.hf_reader import canonical_shapes
from megasp.checkpoints.manifest import directory_name
from megasp.checkpoints.megatron.names import find, unknown
from megasp.checkpoints.megatron.rank_files import read_rank_files
from megasp.checkpoints.megatron.sources import Source, Stored
from megasp.checkpoints.megatron.torch_dist import CONFIG, read_torch_dist
from megasp.checkpoints.megatron.torch_files import Record
from megasp.checkpoints.safetensors_file import Entry
from megasp.checkpoints.whole_tensors import SHARD_BYTES, appearing, write_checkpoint
from megasp.config.load import to_yaml
from megasp.config.megatron_args import config_of
from megasp.config.schema import Config, ModelConfig
from megasp.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTERS = ("param", "fp32_param")
"""Names of the fp32 masters: by the distributed optimizer since megatron-core 0.14, and by all others."""
EMBEDDING = "embedding.word_embeddings.weight"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(?!\d)(.+)")
"""Key of a tensor of the optimizer: its kind, and the key of its weight."""
_NORM = re.compile(r"norm\.weight$")
"""A canonical norm's weight."""
_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..*\.(bucket_idx_|param_state)")
"""Of an optimizer that is stored as its ranks' buffers lie in memory."""


@dataclass(frozen=True)
class Converted:
    """The checkpoint that was written, and what of the run's settings the user must say himself."""

    directory: Path
    config: Config
    step: int
    notes: list[str]


def from_megatron(
    source: Path | str,
    save: Path | str,
    optimizer: bool = True,
    given: Mapping[str, Any] | None = None,
    samples: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write a checkpoint of Megatron-LM's as one of ours, that any layout goes on from.

    Args:
        source: its directory of checkpoints, or one iteration in it.
        save: directory of checkpoints to write; it must be new or empty.
        optimizer: take the optimizer's state; else the weights and the run's progress alone.
        given: fields of the configuration that win over the checkpoint's own settings.
        samples: that the run has consumed, where the checkpoint does not say.
    Raises:
        CheckpointError: a checkpoint that cannot be read, that is of a model or in a format that is not served, or an
            output that exists or cannot be written.
        ConfigError: sizes of a model that cannot be.
    """
    given = given or {}
    directory, root = _iteration(Path(source)), Path(save)
    if (directory / CONFIG).is_file():
        stored = read_torch_dist(directory)
    else:
        stored = read_rank_files(directory, given, optimizer)
    args = _args(stored, directory, given)
    embedding = stored.sources.get(EMBEDDING)
    config, notes = config_of(args, given, embedding.shape[0] if embedding else 0)
    centered = bool(args.get("apply_layernorm_1p"))
    entries = _entries(directory, stored, config.model, optimizer, centered)
    step = stored.common.get("iteration") or args.get("iteration") or 0
    consumed = args.get("consumed_train_samples") if samples is None else samples
    if not isinstance(consumed, int) or not isinstance(step, int):
        rule = "the position in the data is a number of steps and of samples"
        raise CheckpointError(f"{directory} does not say its consumed samples", rule, "give --consumed-train-samples N")
    metadata = {
        "config": asdict(config),
        "progress": {"step": step, "samples": consumed, "tokens": consumed * config.training.seq_length},
        "data": {"phases": []},
        "rng": {"seed": config.training.seed},
        "has_optimizer": any(entry.key.startswith("exp_avg/") for entry in entries),
        "optimizer_steps": _steps(stored.common, step),
        "loss_scale": _loss_scale(stored.common),
        "source": str(directory),
        "versions": {"megasp": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with appearing(root, "--save") as folder:
        write_checkpoint(folder, step, "Megatron-LM", metadata, entries, shard_bytes)
        (folder / "config.yaml").write_text(to_yaml(config))
    return Converted(root / directory_name(step), config, step, notes)


def _iteration(source: Path) -> Path:
    """The directory of one checkpoint: the source, or the latest in it."""
    if (source / CONFIG).is_file() or any(source.glob("mp_rank_*")):
        return source
    try:
        latest = (source / LATEST).read_text(errors="replace").strip()
    except OSError as error:
        rule = f"it holds neither {CONFIG}, nor mp_rank_* directories, nor {LATEST} ({error.strerror})"
        raise CheckpointError(f"{source} is no checkpoint of Megatron-LM's", rule, "check --input") from None
    name = f"iter_{int(latest):07d}" if latest.isdigit() else "release"
    if not (source / name).is_dir():
        raise CheckpointError(f"{source / name} is missing", f"{LATEST} names it", "name another iteration by --input")
    return source / name


def _args(stored: Stored, directory: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run; without any the model's must have been given."""
    args = stored.common.get("args")
    if isinstance(args, Record):
        return vars(args)
    needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
    missing = [f"--{name.replace('_', '-')}" for name in needed if name not in given]
    if missing:
        rule = "its settings (args) are not stored with it"
        fix = f"give the model's flags: {' '.join(missing)} and what else its run was started with"
        raise CheckpointError(f"{directory} does not say what model it is", rule, fix)
    return {}


def _entries(directory: Path, stored: Stored, model: ModelConfig, optimizer: bool, centered: bool) -> list[Entry]:
    """Every tensor to write.

    Args:
        centered: norms compute x * (1 + w) there, and x * w here: their weights are one more, and the moments the same.
    """
    kinds = _by_kind(stored)
    moments = [kind for kind in MOMENTS if optimizer and kind in kinds]
    if optimizer:
        _check_optimizer(directory, stored, kinds)
    weights = next((kind for kind in MASTERS if kind in kinds), "weights")
    shapes = canonical_shapes(model)
    used: set[str] = set()
    entries = []
    for kind, theirs in (("model", weights), *zip(moments, moments, strict=True)):
        for name, shape in shapes.items():
            entry = _entry(directory, kind, name, shape, kinds[theirs], model)
            entries.append(_plus_one(entry) if centered and kind == "model" and _NORM.search(name) else entry)
        used.update(find(name, kinds[theirs])[0] for name in shapes)
    extra = unknown(kinds["weights"], used)
    if extra:
        rule = "it has no place in the model that its settings, or your flags, say"
        fix = "only dense GPT models convert: no experts, latent attention or multi-token prediction"
        raise CheckpointError(f"{directory} has a tensor {extra[0]}", rule, fix)
    return entries


def _by_kind(stored: Stored) -> dict[str, dict[str, Source]]:
    """Tensors by the key of their weight, of the weights themselves and of each kind of the optimizer's state."""
    kinds: dict[str, dict[str, Source]] = defaultdict(dict, weights={})
    for key, source in stored.sources.items():
        match = _OPTIMIZER.fullmatch(key)
        if match:
            kinds[match[1]][match[2]] = source
        elif not _BUCKETS.match(key):
            kinds["weights"][key] = source
    return dict(kinds)


def _check_optimizer(directory: Path, stored: Stored, kinds: Mapping[str, Mapping[str, Source]]) -> None:
    """Refuse an optimizer's state that cannot be taken over."""
    weights_alone = "or convert the weights alone by --no-load-optim"
    if any(map(_BUCKETS.match, (*stored.sources, *stored.objects))):
        rule = "it holds buffers whose order depends on the layout that wrote them"
        again = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
        fix = f"load it in Megatron-LM and save once more with {again}, {weights_alone}"
        raise CheckpointError(f"the optimizer's state in {directory} is not by parameter", rule, fix)
    missing = [kind for kind in MOMENTS if kind not in kinds]
    if missing:
        rule = "going on with a run needs AdamW's moments"
        raise CheckpointError(
            f"{directory} has no {missing[0]}", rule, f"save without --no-save-optim, {weights_alone}"
        )
    narrow = [source for source in kinds["weights"].values() if source.dtype != torch.float32]
    if narrow and not any(kind in kinds for kind in MASTERS):
        rule = f"{narrow[0].key} is {narrow[0].dtype}, and going on with a run needs its fp32 masters"
        raise CheckpointError(f"{directory} has no master weights", rule, f"save with the optimizer, {weights_alone}")


def _entry(
    directory: Path, kind: str, name: str, shape: tuple[int, ...], sources: Mapping[str, Source], model: ModelConfig
) -> Entry:
    """One tensor to write: which rows of which of theirs it is."""
    key, rows = find(name, sources)
    source = sources.get(key)
    what = key if kind == "model" else f"{kind} of {key}"
    if source is None:
        rule = f"it holds {kind}/{name} of the model that its settings, or your flags, say"
        raise CheckpointError(f"{directory} has no tensor {what}", rule, "check the model's flags, or copy it again")
    ranges = rows(model, source.shape[0] if source.shape else 0)
    found = (sum(map(len, ranges)), *source.shape[1:])
    if found != shape:
        rule = f"{name} is {list(found)} there and {list(shape)} by its settings, or your flags"
        fix = "check the model's flags"
        if name in ("embedding.weight", "head.weight"):
            fix = f"for its vocabulary give --vocab-size {found[0]} --make-vocab-size-divisible-by 1"
        raise CheckpointError(f"{what} in {directory} is {list(source.shape)}", rule, fix)
    if source.dtype not in WEIGHT_DTYPES:
        rule = "weights and moments are fp32, bf16 or fp16"
        raise CheckpointError(f"{what} in {directory} is {source.dtype}", rule, "save it without fp8 and the like")
    dtype = source.dtype if kind == "model" else torch.float32  # widened at most
    return Entry(f"{kind}/{name}", dtype, shape, partial(source.rows, ranges, dtype))


def _plus_one(entry: Entry) -> Entry:
    """Its values plus one, in fp32: near one the narrow dtypes are coarser than near zero."""
    return Entry(entry.key, torch.float32, entry.shape, lambda: entry.read().float() + 1)


def _steps(common: Mapping[str, Any], iteration: int) -> int:
    """Steps of Adam's, fewer than the run's where fp16 overflowed; those of the run where nothing says."""
    steps = [int(value) for key, value in _leaves(common.get("optimizer")) if key in ("step", "common_step")]
    return max(steps, default=iteration)


def _loss_scale(common: Mapping[str, Any]) -> dict[str, float]:
    """That of fp16, in our words."""
    found = dict(_leaves(common.get("optimizer")))
    names = {"scale": "scale", "good_steps": "growth_tracker", "overflows_left": "hysteresis_tracker"}
    if not all(name in found for name in names.values()):
        return {"scale": 1.0, "good_steps": 0, "overflows_left": 1}
    return {ours: float(found[theirs]) for ours, theirs in names.items()}


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every number in nested containers, with its key."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield from _leaves(value)
        elif isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            yield str(key), value
