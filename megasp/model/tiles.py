"""A function of a sequence, computed in tiles (arXiv 2506.13996 section 3.1.1): of every token by itself, or also of
what the tiles before have left.

Only the input is kept, and what tiles leave. The backward runs each tile forward again and then back, the last one
first, so what there is at a time does not grow with the sequence. Weight gradients are summed over the tiles in fp32 or
wider.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megasp.footprint import Footprint, Part
from megasp.model.weight_gradients import gradient_dtype
from megasp.sequence_parallel.memory import PastBytes


class Left(Protocol):
    """What tiles leave for those after them, and for their own backward."""

    def take_all(self) -> list[Tensor]:
        """All of it, to be kept until the backward."""

    def put_all(self, tensors: Sequence[Tensor]) -> None:
        """The same, back again."""


class _Tiled(torch.autograd.Function):
    """Saves x, the parameters and what the tiles left."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor, int], Tensor],
        tiles: int,
        left: Left | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.function, ctx.tiles, ctx.left, ctx.parameters = function, tiles, left, parameters
        out = torch.empty_like(x)
        for number, (part, place) in enumerate(zip(x.chunk(tiles), out.chunk(tiles), strict=True)):
            place.copy_(function(part, number))
        ctx.save_for_backward(x, *(left.take_all() if left is not None else ()))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *taken = ctx.saved_tensors
        if ctx.left is not None:
            ctx.left.put_all(taken)
            del taken
        dx = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        parts = zip(x.chunk(ctx.tiles), dy.chunk(ctx.tiles), dx.chunk(ctx.tiles), strict=True)
        for number, (part, dpart, place) in reversed(list(enumerate(parts))):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                out = ctx.function(part, number)
            gradient, *gradients = torch.autograd.grad(out, (part, *ctx.parameters), dpart)
            place.copy_(gradient)
            for index, gradient in enumerate(gradients):
                wide = torch.promote_types(gradient.dtype, torch.float32)
                held = sums[index]
                sums[index] = gradient.to(wide) if held is None else held.add_(gradient)
            del part, out, gradient, gradients
        weights = (
            total.to(gradient_dtype(p)) for total, p in zip(sums, ctx.parameters, strict=True) if total is not None
        )
        return dx, None, None, None, *weights


def tiled(
    function: Callable[[Tensor, int], Tensor],
    x: Tensor,
    tiles: int,
    parameters: Sequence[Tensor],
    left: Left | None = None,
) -> Tensor:
    """function(x), computed for `tiles` parts of dim 0 one after another, forward and backward.

    Args:
        function: (tile [S, ...], its number) -> [S, ...] of the same shape, each position by itself but for what is
            `left`; deterministic. The backward calls it a second time, for the last tile first.
        tiles: as many as fit; fewer where the sequence has fewer positions than that.
        parameters: the leaves that `function` uses, all of which get a gradient.
        left: what tiles leave for those after them.
    """
    return _Tiled.apply(x, function, min(tiles, len(x)), left, *parameters)


def tiled_footprint(tile: Footprint, size: int, tiles: int, weights: int, gradient: int) -> Part:
    """Bytes of what runs in tiles of an input of `size` bytes, each of which holds `tile`; its weights have `weights`
    elements, whose gradients are made in `gradient` bytes each."""
    view = size // tiles  # a tile of the input, and of the gradients, is no memory of its own
    working = max(tile.forward - view, tile.growing - 2 * view, weights * gradient)
    forward, backward = size + tile.passing - view, size + weights * max(gradient, 4) + working
    return Part("residual branch", size, forward, backward, gradients=weights * gradient)


def chunked_footprint(
    first: Footprint, again: Sequence[Footprint], size: int, past: PastBytes, weights: int, gradient: int
) -> Part:
    """Bytes of a layer in chunks of an input of `size` bytes.

    Args:
        first: a chunk that keeps nothing.
        again: a chunk whose backward follows, the last one's and that of the one before; this has the sums of gradients
            from the beginning, and those of `weights` elements of weights, made in `gradient` bytes each.
        past: what the chunks leave.
    """
    view = size // past.chunks  # a chunk of the input and of the gradients is no memory of its own
    kept = {} if past.host else past.kept
    last, before = (max(each.forward - view, each.growing - 2 * view) for each in again)
    popped = 0 if past.host else past.left  # what is kept is there once
    sums = weights * max(gradient, 4)
    working = max(last - popped, before - 2 * popped + sums + past.staying, weights * gradient + sums + past.staying)
    forward = size + sum(kept.values()) + first.passing - view
    return Part("residual stream", size, forward, size + working, kept, gradients=weights * gradient)
