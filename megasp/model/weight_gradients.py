"""How gradients of weights are made: in which dtype, and when.

A leaf may take gradients in a wider dtype than its own (`Tensor.grad_dtype`, set by who sums them): Functions then make
them in that, and what a microbatch adds is not rounded to the compute dtype, as with Megatron-LM's fused gradient
accumulation, but by kernels that write nothing else: fused norms, and fp8 products of the rowwise recipe on a GPU.

They may also wait: a linear layer's backward leaves them in a queue, a zero-bubble schedule runs them later (arXiv
2401.10241). Only GEMM weights wait; norms, biases, embeddings and the head have theirs in the backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasp.model.products import Operand, Products
from megasp.parallel_state import Axis


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which gradients of a weight are made: its own dtype, but for a leaf that takes them in another."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


@dataclass(frozen=True)
class WeightGradient:
    """dW = dy^T x, to be added to the gradient of `weight`.

    Attributes:
        x: what the layer kept of its input, [..., in], or this rank's shard of dim 0 where `gather` is an axis to
            gather it over first.
        dy: its output's gradient, cast over rows, [..., out].
    """

    weight: Tensor
    x: Operand
    dy: Operand
    products: Products
    gather: Axis | None

    def start(self) -> Callable[[], Operand]:
        return self.products.restored(self.x).start_gather(self.gather)

    def finish(self, x: Operand) -> None:
        dw = self.products.multiply(self.dy.transposed, x.transposed, gradient_dtype(self.weight))
        # The backward of a leaf adds to its gradient and runs its hooks, as the backward of the graph would have.
        self.weight.backward(dw)


class WeightGradients:
    """A queue of weight gradients. While `defers` is false, layers compute theirs in the backward as usual."""

    def __init__(self) -> None:
        self.defers = False
        self._queue: list[WeightGradient] = []

    def put(self, gradient: WeightGradient) -> None:
        self._queue.append(gradient)

    def take(self) -> list[WeightGradient]:
        """What was put since the last time."""
        taken, self._queue = self._queue, []
        return taken


@torch.no_grad()
def compute(gradients: Sequence[WeightGradient]) -> None:
    """Compute each and add it to its weight's gradient; the gather of the next one overlaps."""
    pending = [gradients[0].start()] if gradients else []
    for index, gradient in enumerate(gradients):
        pending += [following.start() for following in gradients[index + 1 : index + 2]]
        gradient.finish(pending.pop(0)())
