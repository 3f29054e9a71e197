"""What happens to gradients between the last backward and the optimizer: sums over tensor-parallel replicas, and the
global norm, in which every element of every canonical tensor counts once. Both read nothing but pieces."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megasp.collectives import all_reduce_
from megasp.parallel_state import Axis
from megasp.parameters import Box, Piece, placed


def sum_partial_(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    """Sum the gradients of pieces that several tensor-parallel ranks hold and each knows only in part, in place.

    These are small (norm weights and biases under sequence parallelism, kv heads fewer than ranks), so they travel in
    one all-reduce per dtype. A piece that only some ranks share (a kv head) has its place in a buffer of the whole
    canonical tensor, zeros elsewhere.
    """
    partial = [(view, piece) for p in parameters for view, piece in _views(p) if piece.partial]
    for dtype in sorted({view.dtype for view, _ in partial}, key=str):
        items = [(view, piece) for view, piece in partial if view.dtype == dtype]
        sizes = [math.prod(_shared_box(piece, axis).size) for _, piece in items]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=items[0][0].device)
        places = [
            flat.view(shared.size)[piece.box.relative_to(shared.start).slices]
            for (_, piece), flat in zip(items, buffer.split(sizes), strict=True)
            for shared in [_shared_box(piece, axis)]
        ]
        for (view, _), place in zip(items, places, strict=True):
            place.copy_(view)
        all_reduce_(buffer, axis)
        for (view, _), place in zip(items, places, strict=True):
            view.copy_(place)


def sum_tied_(copies: Sequence[nn.Parameter], ends: Axis) -> None:
    """Sum the gradient of a tied embedding over its copies on the first and the last pipeline stage, in place.

    Args:
        copies: those of this rank; two where one rank holds both stages.
        ends: the ranks of the first and the last stage, where they are two.
    """
    grads = [p.grad for p in copies if p.grad is not None]
    if len(grads) == 2:
        grads[0].add_(grads[1])
        grads[1].copy_(grads[0])
    elif grads:
        all_reduce_(grads[0], ends)


def _shared_box(piece: Piece, axis: Axis) -> Box:
    """What the ranks of the axis hold together: this very box, or the whole tensor where only some share it."""
    return piece.box if piece.replicas == axis.size else Box((0,) * len(piece.shape), piece.shape)


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
    squares = torch.stack(rows).sum() if rows else torch.zeros((), dtype=torch.float64, device=device)
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
