"""The matrix products of a linear layer, each a sum over the last dim of two operands:

    y  = x  W^T      over the features          x, W over their features
    dx = dy W        over the outputs           dy over its features (the outputs), W over its rows
    dW = dy^T x      over the rows (tokens)     dy, x over their rows

`Products` says what an operand is cast to before it is multiplied (nothing here, fp8 in `fp8.py`) and multiplies. A
linear layer (`layers.py`) knows operands alone, so that it is one and the same in every precision: an operand is what
it saves for the backward, gathers over ranks, and leaves to a queue of weight gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megasp.collectives import start_all_gather
from megasp.footprint import Part
from megasp.model.matmul import linear, product
from megasp.parallel_state import Axis

FEATURES, ROWS = -1, 0
"""What a product sums over: the last dim of an operand, or all others."""

INPUT, WEIGHT, GRADIENT = "input", "weight", "gradient"
"""What an operand is of a linear layer; the last is its output's."""


@dataclass(frozen=True)
class Operand:
    """A matrix of rows of features, as products take it.

    Attributes:
        values: [..., F].
        scale: what the values are to be multiplied by: None for 1; of shape [] for all of them; [f] for f equal groups
            of features, the same in all rows; [r, f] for r x f equal blocks of the matrix.
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def matrix(self) -> "Operand":
        """[rows, F]; a scale that is not one for all is [r, f]."""
        scale = self.scale
        return Operand(self._flat, scale if scale is None or scale.dim() == 0 else torch.atleast_2d(scale))

    @property
    def transposed(self) -> "Operand":
        """[F, rows], a view."""
        matrix = self.matrix
        scale = matrix.scale
        return Operand(matrix.values.t(), scale if scale is None or scale.dim() == 0 else scale.t())

    @property
    def _flat(self) -> Tensor:
        return self.values.reshape(-1, self.values.shape[-1])

    def start_gather(self, axis: Axis | None) -> Callable[[], "Operand"]:
        """Gather dim 0 over the ranks of an axis; what is returned waits for it. None gathers nothing.

        Scales of blocks are gathered with their rows; those of all rows the ranks have in common.
        """
        if axis is None:
            return lambda: self
        values, scale = _start_gather(self.values, axis), self.scale
        if scale is None or scale.dim() < 2:
            return lambda: Operand(values(), scale)
        scales = _start_gather(scale, axis)
        return lambda: Operand(values(), scales())


def _start_gather(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Elements of one byte travel as such: not every library of collectives knows fp8."""
    pending = start_all_gather(x.view(torch.uint8) if x.itemsize == 1 else x, axis)
    return lambda: pending.wait().view(x.dtype)


class Products(Protocol):
    """How a linear layer multiplies."""

    def cast(self, x: Tensor, *over: int, of: str = INPUT, gather: Axis | None = None) -> tuple[Operand, ...]:
        """x as an operand of products that sum over `FEATURES` or `ROWS`, one for each that is named.

        Args:
            x: [..., F].
            of: `INPUT`, `WEIGHT` or `GRADIENT`, what it is of the layer.
            gather: the axis whose ranks hold the rest of dim 0, where the operand is to be gathered over it.
        """

    def kept(self, x: Tensor, operand: Operand) -> Operand:
        """What is kept of the input x for its weight gradient, of which `operand` is the cast over rows."""

    def restored(self, kept: Operand) -> Operand:
        """That cast, from what was kept."""

    def multiply(self, a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """a b^T + bias: [..., C] and matrix [N, C] -> [..., N] of the dtype, which is the operands' where there is a
        bias."""

    def keeping_input(self, wanted: bool) -> "Products":
        """The same, where it is `wanted` keeping the input itself, which something else keeps or makes again."""

    def footprint(
        self, name: str, rows: int, inputs: int, outputs: int, item: int, gradient: int, gather: int = 1
    ) -> Part:
        """Bytes of a linear layer on `rows` rows of `inputs` features, which it gathers over `gather` ranks before.

        Args:
            item: bytes of an element of activations and weights.
            gradient: in which its weight's gradient is made.
        """


@dataclass(frozen=True)
class Plain:
    """Products of tensors as they are, in their own dtype."""

    def cast(self, x: Tensor, *over: int, of: str = INPUT, gather: Axis | None = None) -> tuple[Operand, ...]:
        return (Operand(x),) * len(over)

    def kept(self, x: Tensor, operand: Operand) -> Operand:
        return operand

    def restored(self, kept: Operand) -> Operand:
        return kept

    def multiply(self, a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        return linear(a.values, b.values, bias) if dtype == a.values.dtype else product(a.values, b.values, dtype)

    def keeping_input(self, wanted: bool) -> "Plain":
        return self

    def footprint(
        self, name: str, rows: int, inputs: int, outputs: int, item: int, gradient: int, gather: int = 1
    ) -> Part:
        x, y, weight = rows * inputs * item, gather * rows * outputs * item, inputs * outputs * gradient
        gathered = gather * x if gather > 1 else 0
        backward = 2 * gathered + x + weight
        return Part(name, y, y + gathered, backward, deferred=x + y, gradients=weight, put_off=gathered + x)


PLAIN = Plain()
