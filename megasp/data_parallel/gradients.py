"""What happens to gradients between the last backward and the optimizer: sums over tensor-parallel replicas, and the
global norm, in which every element of every canonical tensor counts once. Both read nothing but pieces."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megasp.collectives import all_reduce_, start_exchange
from megasp.parallel_state import Axis
from megasp.parameters import Piece, placed

BUCKET_BYTES = 64 * 2**20
"""Most that travels at a time."""


def sum_partial_(parameters: Sequence[nn.Parameter], axis: Axis, device: torch.device | None = None) -> None:
    """Sum the gradients of pieces that several tensor-parallel ranks hold and each knows only in part, in place.

    Norm weights and biases under sequence parallelism are held by all ranks of the axis; the weights of a kv head,
    where there are fewer of them than ranks, by some neighbours.

    Args:
        device: where to sum; that of the gradients without it.
    """
    partial = [(view, piece) for p in parameters for view, piece in _views(p) if piece.partial]
    for (replicas, _), items in itertools.groupby(sorted(partial, key=_kind), _kind):
        views = [view for view, _ in items]
        first = axis.rank // replicas * replicas
        peers = [rank for rank in range(first, first + replicas) if rank != axis.rank]
        for bucket in _buckets(views):
            flat = torch.cat([view.flatten() for view in bucket]).to(device)
            total = all_reduce_(flat, axis) if replicas == axis.size else _sum_over(flat, peers, axis)
            for view, part in zip(bucket, total.split([view.numel() for view in bucket]), strict=True):
                view.copy_(part.view_as(view))


def _kind(item: tuple[Tensor, Piece]) -> tuple[int, str]:
    """What must be equal of gradients that travel together: the number of ranks and the dtype."""
    view, piece = item
    return piece.replicas, str(view.dtype)


def _buckets(views: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of views that hold at most `BUCKET_BYTES`, or one that holds more."""
    bucket: list[Tensor] = []
    for view in views:
        if bucket and sum(other.nbytes for other in bucket) + view.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(view)
    yield bucket


def _sum_over(x: Tensor, peers: Sequence[int], axis: Axis) -> Tensor:
    """The sum over this rank and its peers on the axis, added in the order of ranks, so the same on each."""
    parts = {rank: torch.empty_like(x) for rank in peers}
    start_exchange([(x, rank) for rank in peers], [(part, rank) for rank, part in parts.items()], axis).wait()
    first, *others = (part for _, part in sorted((parts | {axis.rank: x}).items()))
    for part in others:
        first = first + part
    return first


def sum_tied_(copies: Sequence[nn.Parameter], ends: Axis, device: torch.device | None = None) -> None:
    """Sum the gradient of a tied embedding over its copies on the first and the last pipeline stage, in place.

    Args:
        copies: those of this rank; two where one rank holds both stages.
        ends: the ranks of the first and the last stage, where they are two.
        device: where to sum; that of the gradients without it.
    """
    grads = [p.grad for p in copies if p.grad is not None]
    if len(grads) == 2:
        grads[0].add_(grads[1])
        grads[1].copy_(grads[0])
    elif grads:
        grads[0].copy_(all_reduce_(grads[0].to(device), ends))


def _views(parameter: nn.Parameter) -> list[tuple[Tensor, Piece]]:
    """Each piece's part of the gradient."""
    assert parameter.grad is not None
    return [(parameter.grad[local.slices], piece) for piece, local in placed(parameter.pieces)]  # type: ignore[attr-defined]


def global_norm(
    parameters: Sequence[nn.Parameter], *model_axes: Axis, device: torch.device | str | None = None
) -> Tensor:
    """The norm of the whole model's gradient, fp64 scalar, the same on every rank.

    Args:
        parameters: this rank's, their gradients reduced.
        model_axes: their ranks hold one replica of the model together: those that split it, those that shard it.
        device: where to sum; that of the parameters without it.

    Norms are taken by rows and summed in fp64: an fp32 norm over a whole embedding is off in the third digit on a CPU.
    """
    owned = [view for p in parameters for view, piece in _views(p) if piece.replica == 0]
    rows = [torch.linalg.vector_norm(view, dim=-1).double().square_().sum() for view in owned]
    device = device or parameters[0].device
    squares = torch.stack(rows).sum().to(device) if rows else torch.zeros((), dtype=torch.float64, device=device)
    for axis in model_axes:
        all_reduce_(squares, axis)
    return squares.sqrt()


def clip_(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float, loss_scale: float = 1.0) -> None:
    """Take the loss scale off gradients, and scale them so that their global norm is at most `limit`; in place.

    Args:
        norm: the global norm without the loss scale.
        limit: 0 is no limit.
        loss_scale: what the gradients are multiplied by.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0).item() if limit > 0 else 1.0
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and (limit > 0 or loss_scale != 1):
        torch._foreach_mul_(grads, factor / loss_scale)
