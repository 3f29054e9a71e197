"""Megatron-LM's older `--ckpt-format torch`: what each tensor- and pipeline-parallel rank held, a file each.

    iter_0000100/mp_rank_01/model_optim_rng.pt         tensor-parallel rank 1
    iter_0000100/mp_rank_01_002/model_optim_rng.pt     and pipeline rank 2

A stage counts its layers from 0, and its optimizer its parameters by their place in a list: both are given the names
here that `torch_dist` would have stored them under.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megasp.checkpoints.megatron.names import GATED, IGNORED, split_dim
from megasp.checkpoints.megatron.sources import Part, Source, Stored
from megasp.checkpoints.megatron.torch_files import WRITE_AGAIN, read_torch
from megasp.errors import CheckpointError
from megasp.parameters import Box

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")

State = dict[str, Tensor]
"""Tensors of one rank's model, or of one kind of its optimizer's, by name."""


def read_rank_files(directory: Path, given: Mapping[str, Any], optimizer: bool) -> Stored:
    """What such a checkpoint holds. Its tensors stay in mappings of the files.

    Args:
        given: fields of the configuration that the user gave.
        optimizer: read its state.
    Raises:
        CheckpointError: files that are missing, damaged or name what is not allowed, or a model of before
            megatron-core.
    """
    files = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            rule = "files are of tensor- and pipeline-parallel ranks; a third number is of ranks that hold experts"
            raise CheckpointError(f"{path} is no rank of a dense model", rule, "only dense GPT models convert")
        files[int(match[1]), int(match[2] or 0)] = read_torch(path / FILE)
    tp, pp = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    if len(files) != tp * pp:
        rule = f"the ranks are tensor {tp} x pipeline {pp}"
        raise CheckpointError(f"{directory} holds {len(files)} ranks' files", rule, WRITE_AGAIN)
    try:
        ranks = [[files[rank, stage] for stage in range(pp)] for rank in range(tp)]
        sources = {source.key: source for source in _sources(directory, ranks, given, optimizer)}
        common = {name: value for name, value in files[0, 0].items() if not name.startswith("model")}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        rule = f"they must hold the same tensors of one model ({type(error).__name__}: {error})"
        raise CheckpointError(f"the files of {directory} cannot be used", rule, WRITE_AGAIN) from None
    flat = any(directory.glob("mp_rank_*/distrib_optim.pt"))
    return Stored(sources, common, ("optimizer.distributed.dp_group_idx_0.param_state",) if flat else ())


def _sources(
    directory: Path, ranks: Sequence[Sequence[Mapping[str, Any]]], given: Mapping[str, Any], optimizer: bool
) -> Iterator[Source]:
    """Every tensor of the model and of its optimizer; `ranks` are by tensor-parallel rank and stage."""
    args = ranks[0][0].get("args")
    gated, untied = (
        given.get(name, getattr(args, name, False)) for name in ("swiglu", "untie_embeddings_and_output_weights")
    )
    kinds: dict[str, list[State]] = defaultdict(list)  # of the optimizer, and "" for weights: by tensor-parallel rank
    for stages in ranks:
        for kind, state in _whole_depth(directory, stages, not untied, optimizer).items():
            kinds[kind].append(state)
    for kind, states in kinds.items():
        for key in states[0]:
            name = f"optimizer.state.{kind}.{key}" if kind else key
            yield _source(name, [state[key] for state in states], split_dim(key), gated and GATED in key)


def _whole_depth(directory: Path, stages: Sequence[Mapping[str, Any]], tied: bool, optimizer: bool) -> dict[str, State]:
    """Weights and optimizer of a tensor-parallel rank over all stages, with global layer numbers."""
    chunks = []
    for number, stage in enumerate(stages):
        keys = sorted((key for key in stage if re.fullmatch(r"model\d*", key)), key=lambda key: int(key[5:] or 0))
        models = [_tensors(directory, stage[key]) for key in keys]
        states = _optimizer(directory, stage.get("optimizer"), models) if optimizer else {}
        for virtual, model in enumerate(models):
            own = {kind: state[virtual] for kind, state in states.items()}
            chunks.append((virtual, number, {"": model} | own))
    found: dict[str, State] = defaultdict(dict)
    first = 0
    for _, _, kinds in sorted(chunks, key=lambda chunk: chunk[:2]):  # layers go through all stages, chunk by chunk
        layers = 0
        for kind, state in kinds.items():
            for key, tensor in state.items():
                match = _LAYER.fullmatch(key)
                if match:
                    layers = max(layers, int(match[2]) + 1)
                    found[kind][f"{match[1]}{first + int(match[2])}{match[3]}"] = tensor
                elif not (tied and key == "output_layer.weight"):  # the last stage's copy of the embedding
                    found[kind][key] = tensor
        first += layers
    return dict(found)


def _tensors(directory: Path, model: Any) -> State:
    if not isinstance(model, Mapping) or "language_model" in model:
        rule = "its names are those of Megatron-LM before megatron-core"
        fix = "convert it by Megatron-LM's tools/checkpoint/convert.py --saver core first"
        raise CheckpointError(f"{directory} holds another kind of model", rule, fix)
    return {key: value for key, value in model.items() if isinstance(value, Tensor) and not key.endswith(IGNORED)}


def _optimizer(directory: Path, optimizer: Any, models: Sequence[State]) -> dict[str, list[State]]:
    """Kind of state -> its tensors, for each model chunk of a rank.

    Megatron-core numbers parameters through their groups, and in each in the order of the model: matrices are in the
    group that decays, biases and norms in the one that does not.
    """
    if not isinstance(optimizer, Mapping):
        return {}
    inner = optimizer.get("optimizer", optimizer)
    if not isinstance(inner, Mapping) or not inner.get("state"):
        return {}
    masters = optimizer.get("fp32_from_fp16_params")
    found: dict[str, list[State]] = defaultdict(lambda: [{} for _ in models])
    for place, group in enumerate(inner["param_groups"]):
        decays = group.get("wd_mult", 1.0) != 0
        names = [
            (chunk, key)
            for chunk, model in enumerate(models)
            for key, tensor in model.items()
            if decays == (tensor.dim() > 1 and not key.endswith(".bias"))
        ]
        if len(names) != len(group["params"]):
            rule = f"a group of it has {len(group['params'])} parameters, and the model {len(names)} such"
            fix = "save it with --ckpt-format torch_dist, or convert the weights alone by --no-load-optim"
            raise CheckpointError(f"the optimizer's state in {directory} cannot be matched", rule, fix)
        for index, ((chunk, key), number) in enumerate(zip(names, group["params"], strict=True)):
            for kind in ("exp_avg", "exp_avg_sq"):
                found[kind][chunk][key] = inner["state"][number][kind]
            if masters:
                found["fp32_param"][chunk][key] = masters[place][index]
    return found


def _source(key: str, shards: Sequence[Tensor], dim: int | None, gated: bool) -> Source:
    """A tensor of the whole model, of the tensor-parallel ranks' shards of it.

    Args:
        dim: that they split; None where each holds all of it.
        gated: each shard is its rows of gate over its rows of up.
    """
    shape = list(shards[0].shape)
    if dim is None:
        return Source(key, shards[0].dtype, tuple(shape), tuple(_parts(shards[:1], 0, 0)))
    if not gated:
        total = sum(shard.shape[dim] for shard in shards)
        shape[dim] = total
        return Source(key, shards[0].dtype, tuple(shape), tuple(_parts(shards, dim, 0)))
    halves = [shard.chunk(2) for shard in shards]
    gate, up = (tuple(_parts([half[i] for half in halves], 0, i * sum(len(h[0]) for h in halves))) for i in (0, 1))
    shape[0] = sum(map(len, shards))
    return Source(key, shards[0].dtype, tuple(shape), (*gate, *up))


def _parts(shards: Sequence[Tensor], dim: int, first: int) -> Iterator[Part]:
    for shard in shards:
        start = [0] * shard.dim()
        start[dim] = first
        yield Part(Box(tuple(start), tuple(shard.shape)), partial(_itself, shard))
        first += shard.shape[dim]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
