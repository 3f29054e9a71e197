"""A function of every token by itself, computed in tiles of the sequence (arXiv 2506.13996 section 3.1.1).

Only the input is kept. The backward runs each tile forward again and then back, so what there is at a time does not
grow with the sequence times the MLP's hidden size. Weight gradients are summed over the tiles in fp32 or wider.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megasp.footprint import Footprint, Part
from megasp.model.weight_gradients import gradient_dtype


class _Tiled(torch.autograd.Function):
    """Saves x and the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], tiles: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.tiles, ctx.parameters = function, tiles, parameters
        out = torch.empty_like(x)
        for part, place in zip(x.chunk(tiles), out.chunk(tiles), strict=True):
            place.copy_(function(part))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for part, dpart, place in zip(x.chunk(ctx.tiles), dy.chunk(ctx.tiles), dx.chunk(ctx.tiles), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                out = ctx.function(part)
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
        return dx, None, None, *weights


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tiles: int, parameters: Sequence[Tensor]) -> Tensor:
    """function(x), computed for `tiles` parts of dim 0 one after another, forward and backward.

    Args:
        function: [S, ...] -> [S, ...] of the same shape, each position by itself; deterministic.
        tiles: as many as fit; fewer where the sequence has fewer positions than that.
        parameters: the leaves that `function` uses, all of which get a gradient.
    """
    return _Tiled.apply(x, function, min(tiles, len(x)), *parameters)


def tiled_footprint(tile: Footprint, size: int, tiles: int, weights: int, gradient: int) -> Part:
    """Bytes of what runs in tiles of an input of `size` bytes, each of which holds `tile`; its weights have `weights`
    elements, whose gradients are made in `gradient` bytes each."""
    view = size // tiles  # a tile of the input, and of the gradients, is no memory of its own
    gradients = weights * (max(gradient, 4) + gradient)
    working = max(tile.forward - view, tile.backward - 2 * view)
    return Part("residual branch", size, size + tile.passing - view, size + gradients + working)
