"""Weight gradients that wait: a linear layer's backward leaves them here, a zero-bubble schedule runs them later
(arXiv 2401.10241). Only GEMM weights wait; norms, biases, embeddings and the head have theirs in the backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasp.collectives import Pending, start_all_gather
from megasp.model.matmul import linear
from megasp.parallel_state import Axis


@dataclass(frozen=True)
class WeightGradient:
    """dW = dy^T x, to be added to the gradient of `weight`.

    Attributes:
        x: [..., in], or this rank's shard of dim 0 where `gather` is an axis to gather it over first.
        dy: [..., out].
    """

    weight: Tensor
    x: Tensor
    dy: Tensor
    gather: Axis | None

    def start(self) -> Pending:
        return Pending(self.x) if self.gather is None else start_all_gather(self.x, self.gather)

    def finish(self, x: Pending) -> None:
        dw = linear(self.dy.reshape(-1, self.dy.shape[-1]).t(), x.wait().reshape(-1, self.weight.shape[1]).t())
        # The backward of a leaf adds to its gradient and runs its hooks, as the backward of the graph would have.
        self.weight.backward(dw)


class WeightGradients:
    """A queue of weight gradients. While `defers` is false, layers compute theirs in the backward as usual."""

    def __init__(self) -> None:
        self.defers = False
        self._queue: list[WeightGradient] = []

    def put(self, weight: Tensor, x: Tensor, dy: Tensor, gather: Axis | None) -> None:
        self._queue.append(WeightGradient(weight, x, dy, gather))

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
        gradient.finish(pending.pop(0))
