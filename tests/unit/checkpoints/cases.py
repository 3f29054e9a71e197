"""A small model's canonical tensors, and the shards of any tensor x data layout of it, for the checkpoint tests."""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megasp.checkpoints import Manifest, Shard, save, writer
from megasp.checkpoints.manifest import merge
from megasp.checkpoints.writer import Content
from megasp.parallel_state import ParallelState
from megasp.parameters import Piece, local_shape, placed, rows_of, split, whole

D, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 8, 4, 2, 2, 12, 20
KINDS = ("model", "exp_avg", "exp_avg_sq")


def parameters(tp: int, rank: int) -> list[tuple[Piece, ...]]:
    """The pieces of each parameter of a tensor-parallel rank; kv heads fewer than ranks are replicated."""
    layer, each = "layers.0", max(1, tp // KV_HEADS)

    def rows(name: str, size: int, replicas: int = 1) -> Piece:
        piece = split(name, (size, D), rank // replicas, tp // replicas)
        return piece.with_replicas(rank % replicas, replicas, partial=False)

    return [
        (rows("embedding.weight", VOCAB),),
        (whole(f"{layer}.input_norm.weight", (D,)).with_replicas(rank, tp, partial=False),),
        (
            rows(f"{layer}.attention.q.weight", HEADS * HEAD_DIM),
            rows(f"{layer}.attention.k.weight", KV_HEADS * HEAD_DIM, each),
            rows(f"{layer}.attention.v.weight", KV_HEADS * HEAD_DIM, each),
        ),
        (split(f"{layer}.attention.o.weight", (D, HEADS * HEAD_DIM), rank, tp, dim=1),),
        (rows(f"{layer}.mlp.gate.weight", MLP), rows(f"{layer}.mlp.up.weight", MLP)),
        (split(f"{layer}.mlp.down.weight", (D, MLP), rank, tp, dim=1),),
    ]


def reference(kind: str, piece: Piece) -> Tensor:
    """The canonical tensor: random, keyed by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{piece.name}".encode()))
    return torch.randn(piece.shape, generator=generator)


def shards(tp: int, tp_rank: int, dp: int = 1, dp_rank: int = 0, fill: bool = True) -> list[Shard]:
    """What a rank holds: weights as they are, moments cut by rows over the data ranks (unevenly, as ZeRO does)."""
    held = []
    for kind, pieces in itertools.product(KINDS, parameters(tp, tp_rank)):
        if kind != "model":
            rows = local_shape(pieces)[0]
            each = -(-rows // dp)
            pieces = rows_of(pieces, min(rows, dp_rank * each), min(rows, (dp_rank + 1) * each))
        tensor = torch.zeros(local_shape(pieces)) if pieces else torch.zeros(0, D)
        for piece, local in placed(pieces) if fill else ():
            tensor[local.slices] = reference(kind, piece)[piece.box.slices]
        held.append(Shard(kind, tensor, pieces, owner=kind != "model" or dp_rank == 0))
    return held


def mismatches(held: list[Shard]) -> Iterator[str]:
    """Names of the pieces that are not bit for bit the reference."""
    for shard in held:
        for piece, local in placed(shard.pieces):
            if not torch.equal(shard.tensor[local.slices], reference(shard.kind, piece)[piece.box.slices]):
                yield f"{shard.kind}/{piece.name}"


def save_ranks(root: Path, name: str, held: Iterable[Sequence[Shard]]) -> Path:
    """The checkpoint of step 1 that `megasp.checkpoints.save` writes on ranks which hold these shards."""
    partial, final = root / ".step_00000001.partial", root / "step_00000001"
    partial.mkdir(parents=True)
    parts = [writer._write_content(partial, Content.of(shards, rank)) for rank, shards in enumerate(held)]
    writer._publish(partial, final, Manifest(1, name, {}, *merge(parts)))
    return final


def save_one(root: Path, step: int = 1, **metadata: object) -> Path:
    """A checkpoint written by one process."""
    return save(root, step, shards(1, 0), ParallelState.single(), metadata)
