"""The loss of a batch whose tokens are split over ranks: a sum over shards divided by the global number of targets.

A rank's loss is its share of it, scaled so that the *mean over ranks* is the loss per token of the global batch. So the
averages of gradients that DDP and `fully_shard` make are the gradient of that loss, however many targets each shard
holds, none included. `num_items_in_batch`, where a caller counts the targets of several microbatches (as Trainer does,
over all ranks), is that number; Trainer itself multiplies by the ranks. Without it the batch's are counted.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasp.collectives import all_reduce_
from megasp.errors import ConfigError
from megasp.huggingface.batches import IGNORED
from megasp.huggingface.precision import cast
from megasp.model.loss import linear_cross_entropy
from megasp.parallel_state import Axis, ParallelState


class ShardedLoss:
    """transformers' `loss_function` over shards.

    Args:
        state: whose ranks hold the batch.

    Attributes:
        called: whether it was since this was last set to False.
        head: that computes the sum itself, and gives it in the place of logits.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state, self.called = state, False
        self.head: ChunkedHead | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """This rank's share of the loss.

        Args:
            logits: [B, S, V], or what `head` returned.
            shift_labels: [B, S], the token after each, `IGNORED` where none counts.
            num_items_in_batch: targets of the global batch.
        """
        self.called = True
        assert shift_labels is not None, "the hook before the model's forward sees to it"
        if self.head is not None and self.head.targets is not None:
            total = self.head.sum_in_place_of(logits)
        else:
            wide = torch.promote_types(logits.dtype, torch.float32)
            rows, targets = logits.to(wide).flatten(0, 1), shift_labels.to(logits.device).flatten()
            total = F.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
        loss = total / self._targets(shift_labels, total, num_items_in_batch)
        # In evaluation nobody averages the ranks' gradients, and each may be asked for its loss.
        return loss if torch.is_grad_enabled() else all_reduce_(loss.clone(), self.state.cp) / self.state.cp.size

    def _targets(self, labels: Tensor, total: Tensor, given: Tensor | float | None) -> Tensor | float:
        """Targets by which a rank divides."""
        if given is not None:
            return given.to(total.device).clamp(min=1) if isinstance(given, Tensor) else max(given, 1)
        ranks = self.state.gradients if torch.is_grad_enabled() else self.state.cp
        count = (labels != IGNORED).sum().to(total.device, torch.float64)
        return (all_reduce_(count, ranks).clamp(min=1) / ranks.size).to(total.dtype)


class ChunkedHead:
    """An output head that gives the summed loss in the place of logits, which never exist (`megasp.model.loss`).

    It takes the place of the head's forward; parameters and their names stay. Without targets it is the head's own.

    Args:
        head: a linear layer without bias.

    Attributes:
        targets: shifted labels of the batch, [B, S]; None for logits.
        sum: of its losses, once the head was called.
    """

    def __init__(self, head: nn.Module) -> None:
        if type(head) is not nn.Linear or head.bias is not None:
            raise ConfigError(
                f"chunked_loss with an output head that is {type(head).__name__}"
                + (" with a bias" if getattr(head, "bias", None) is not None else ""),
                "it computes a linear head without bias itself",
                "leave chunked_loss out",
            )
        self.head: nn.Linear = head
        self.targets: Tensor | None = None
        self.sum: Tensor | None = None
        self._logits: Callable[[Tensor], Tensor] = head.forward
        head.forward = self._forward

    def _forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] -> the sum of the losses, or logits."""
        if self.targets is None:
            return self._logits(hidden)
        labels = self.targets.to(hidden.device)
        mask = labels != IGNORED
        with cast(hidden, self.head.weight) as (hidden, weight):
            self.sum = linear_cross_entropy(hidden, weight, labels.masked_fill(~mask, 0), mask, Axis("tp"))
        return self.sum

    def sum_in_place_of(self, logits: Tensor) -> Tensor:
        """The sum, which must be what the model passes to its loss."""
        if logits is not self.sum:
            raise ConfigError(
                "chunked_loss with a model that changes its logits after the head (soft-capping, scaling)",
                "the loss is computed with the head",
                "leave chunked_loss out",
            )
        return logits

    def finish(self) -> Tensor | None:
        """Forget the batch; returns its sum, where there was one."""
        total, self.targets, self.sum = self.sum, None, None
        return total
