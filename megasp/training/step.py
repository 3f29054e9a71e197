"""One training step, and one evaluation, on this rank.

    loss = sum of token losses over the whole global batch / number of unmasked target tokens in it

The number is known before the first backward, so every microbatch's sum is divided by it, gradients are summed over
everything that splits the batch, and no layout or batch size changes what is computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasp.collectives import all_reduce_
from megasp.data import Batch
from megasp.data_parallel import clip_, global_norm, sum_partial_, sum_tied_
from megasp.training.build import Training
from megasp.training.optimizer import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step found: mean loss per token, global gradient norm before clipping, unmasked target tokens, and the
    loss scale that it used."""

    loss: float
    grad_norm: float
    tokens: int
    loss_scale: float


def train_step(
    training: Training, microbatches: Sequence[Batch], lr: float, decoupled_lr: float | None = None
) -> StepResult:
    """Forward and backward over this rank's microbatches, reduction, clipping, and the optimizer's step.

    Args:
        decoupled_lr: the rate of embedding and output layer, where they have their own.
    """
    scale = training.loss_scale.scale
    loss, tokens = accumulate_gradients(training, microbatches)
    return StepResult(loss, apply_gradients(training, lr, decoupled_lr), tokens, scale)


def accumulate_gradients(training: Training, microbatches: Sequence[Batch]) -> tuple[float, int]:
    """Leave the gradient of the global batch's loss, times the loss scale, on the master weights; return that loss and
    its token count."""
    training.model.train()
    tokens = _count(training, microbatches)
    total = training.pipeline.train(microbatches, max(tokens, 1) / training.loss_scale.scale)
    training.replicas.finish()
    sum_partial_(training.replicas.masters, training.state.tp, training.state.device)
    sum_tied_(training.tied, training.state.ends, training.state.device)
    return _mean(training, total, tokens), tokens


def apply_gradients(training: Training, lr: float, decoupled_lr: float | None = None) -> float:
    """Take off the loss scale, clip, step, and publish the new weights; return the global norm before clipping.

    A gradient that is not finite is not applied: the weights stay as they were, and a dynamic loss scale falls.
    """
    masters, state, scale = training.replicas.masters, training.state, training.loss_scale
    norm = global_norm(masters, state.model, training.replicas.shard_axis, device=state.device) / scale.scale
    finite = bool(torch.isfinite(norm))
    if finite:
        clip_(masters, norm, training.config.optimizer.clip_grad, scale.scale)
        for part in training.optimizer.parts:
            set_learning_rate(part, lr, decoupled_lr)
        training.optimizer.step()
    scale.update(overflow=not finite)
    training.replicas.publish()
    return norm.item()


@torch.no_grad()
def evaluate(training: Training, steps: Iterable[Sequence[Batch]]) -> float:
    """Mean loss per unmasked token of some global batches, without dropout."""
    training.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=training.state.device)
    tokens = 0
    for batches in steps:
        tokens += _count(training, batches)
        total += training.pipeline.evaluate(batches)
    return _mean(training, total, tokens)


def _mean(training: Training, total: Tensor, tokens: int) -> float:
    """Loss per token from this rank's sum of losses, which only the ranks of the last stage have."""
    all_reduce_(all_reduce_(total, training.state.gradients), training.state.pp)
    return (total / max(tokens, 1)).item()


def _count(training: Training, batches: Sequence[Batch]) -> int:
    """Unmasked target tokens of all ranks."""
    count = torch.tensor(sum(float(batch.loss_mask.sum(dtype="float64")) for batch in batches), dtype=torch.float64)
    return int(all_reduce_(count.to(training.state.device), training.state.gradients).item())
