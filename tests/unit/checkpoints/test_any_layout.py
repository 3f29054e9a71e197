"""Any layout to any layout, 1 to 8 ranks each, weights and both moments, bit for bit: random pairs of them.

Every rank's parameters are those of the real model; ranks are taken one after the other in this process.
"""

import itertools
import math
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import zeros

from megasp.checkpoints import Shard, load
from megasp.config.layout import AXES, Layout
from megasp.config.schema import ModelConfig
from megasp.model import Factory, GPTModel
from megasp.parallel_state import UNIONS, Axis, ParallelState
from megasp.parameters import Piece, local_shape, placed, rows_of
from megasp.pipeline.schedules import placement
from megasp.sequence_parallel import SequenceAttention
from tests.unit.checkpoints.cases import KINDS, mismatches, reference, save_ranks

LAYERS = 5


@dataclass(frozen=True)
class Run:
    """A layout, its stages (the first layer of each but the first), their placement, and whether weights and moments
    are whole on each replica, or cut over its ranks but the outer ones, as ZeRO does."""

    layout: Layout
    cuts: tuple[int, ...]
    chunks: int
    schedule: str
    sharded: bool


@st.composite
def runs(draw: Any) -> Run:
    sizes = itertools.product((1, 2, 4), (1, 2, 3, 4), *[(1, 2, 3, 5)] * 3, (1, 2))
    tp, pp, ulysses, ring, dp, outer = draw(st.sampled_from([each for each in sizes if math.prod(each) <= 8]))
    schedule, chunks = draw(st.sampled_from([("1f1b", 1), ("interleaved", 2), ("zbv", 2)])) if pp > 1 else ("1f1b", 1)
    # A stage may be empty of layers: the ends have an embedding or a head.
    cuts = draw(st.lists(st.integers(0, LAYERS), min_size=pp * chunks - 1, max_size=pp * chunks - 1))
    return Run(Layout(pp, outer, dp, ring, ulysses, tp), tuple(sorted(cuts)), chunks, schedule, draw(st.booleans()))


MODELS = [
    ModelConfig(
        num_layers=LAYERS, hidden_size=16, num_attention_heads=4, ffn_hidden_size=24, vocab_size=40,
        make_vocab_size_divisible_by=8, attention_dropout=0.0, max_position_embeddings=6, **values,
    )
    for values in (
        {"num_query_groups": 2, "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False,
         "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True, "qk_layernorm": True},
        {"num_query_groups": 1, "add_qkv_bias": True},
    )
]  # fmt: skip
"""Untied with rotary; tied, multi-query, with biases and learned positions. Both with kv heads fewer than ranks."""


def state_of(layout: Layout, rank: int) -> ParallelState:
    """What a rank knows of the grid, without process groups."""
    index = layout.coordinates(rank)
    axes = {name: Axis(name, size, index[name]) for name, size in zip(AXES, layout.sizes, strict=True)}
    for union, parts in UNIONS.items():
        group = layout.group(parts, rank)
        axes[union] = Axis(union, len(group), group.index(rank))
    return replace(ParallelState.single(), layout=layout, rank=rank, axes=axes)


@cache
def parameters(model: ModelConfig, run: Run, rank: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of every parameter of a rank."""
    state, edges = state_of(run.layout, rank), [0, *run.cuts, LAYERS]
    owner = placement(run.schedule, run.layout.pp, run.chunks)
    stages = [
        GPTModel(
            model, state, layers=range(edges[n], edges[n + 1]), first=n == 0, last=n == len(owner) - 1,
            attend=SequenceAttention(ParallelState.single()), factory=Factory("meta"),
        )
        for n in range(len(owner)) if owner[n] == state.pp.rank
    ]  # fmt: skip
    return tuple(p.pieces for stage in stages for p in stage.parameters())  # type: ignore[attr-defined]


def held(model: ModelConfig, run: Run, rank: int, fill: bool) -> list[Shard]:
    """The shards of a rank."""
    state = state_of(run.layout, rank)
    sharing, replicas = state.axes["dp_cp"], state.axes["dp_outer"] if run.sharded else state.gradients
    found = []
    for kind, pieces in itertools.product(KINDS, parameters(model, run, rank)):
        if run.sharded:
            rows = local_shape(pieces)[0]
            each = -(-rows // sharing.size)
            start = min(rows, sharing.rank * each)
            pieces = rows_of(pieces, start, min(rows, start + each))
        tensor = zeros(local_shape(pieces)) if pieces else zeros(0, 1)
        for piece, local in placed(pieces) if fill else ():
            tensor[local.slices] = reference(kind, piece)[piece.box.slices]
        found.append(Shard(kind, tensor, pieces, owner=replicas.rank == 0))
    return found


@settings(max_examples=max(10, settings().max_examples // 4))
@given(st.sampled_from(MODELS), runs(), runs())
def test_any_to_any(model: ModelConfig, saved: Run, loaded: Run) -> None:
    with tempfile.TemporaryDirectory() as root:
        ranks = range(saved.layout.world_size)
        directory = save_ranks(Path(root), saved.layout.name, (held(model, saved, rank, fill=True) for rank in ranks))
        for rank in range(loaded.layout.world_size):
            shards = held(model, loaded, rank, fill=False)
            load(directory, shards)
            assert list(mismatches(shards)) == []
