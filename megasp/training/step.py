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
from megasp.data_parallel import clip_, global_norm, sum_partial_
from megasp.training.build import Training
from megasp.training.optimizer import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step found: mean loss per token, global gradient norm before clipping, unmasked target tokens."""

    loss: float
    grad_norm: float
    tokens: int


def train_step(training: Training, microbatches: Sequence[Batch], lr: float) -> StepResult:
    """Forward and backward over this rank's microbatches, reduction, clipping, and the optimizer's step."""
    loss, tokens = accumulate_gradients(training, microbatches)
    return StepResult(loss, apply_gradients(training, lr), tokens)


def accumulate_gradients(training: Training, microbatches: Sequence[Batch]) -> tuple[float, int]:
    """Leave the gradient of the global batch's loss on the master weights; return that loss and its token count."""
    training.model.train()
    tokens = _count(training, microbatches)
    total = torch.zeros((), dtype=torch.float64, device=training.state.device)
    for index, batch in enumerate(microbatches):
        training.replicas.begin_microbatch(last=index == len(microbatches) - 1)
        loss_sum = _forward(training, batch, with_dropout=True)
        (loss_sum / max(tokens, 1)).backward()
        total += loss_sum.detach()
    training.replicas.finish()
    sum_partial_(training.replicas.masters, training.state.tp)
    return (all_reduce_(total, training.state.gradients) / max(tokens, 1)).item(), tokens


def apply_gradients(training: Training, lr: float) -> float:
    """Clip, step, and publish the new weights; return the gradient's global norm before clipping.

    A gradient that is not finite is not applied: the weights stay as they were.
    """
    masters = training.replicas.masters
    norm = global_norm(masters, training.state.model)
    if torch.isfinite(norm):
        clip_(masters, norm, training.config.optimizer.clip_grad)
        set_learning_rate(training.optimizer, lr)
        training.optimizer.step()
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
        for batch in batches:
            total += _forward(training, batch, with_dropout=False)
    return (all_reduce_(total, training.state.gradients) / max(tokens, 1)).item()


def _count(training: Training, batches: Sequence[Batch]) -> int:
    """Unmasked target tokens of all ranks."""
    count = torch.tensor(sum(float(batch.loss_mask.sum(dtype="float64")) for batch in batches), dtype=torch.float64)
    return int(all_reduce_(count.to(training.state.device), training.state.gradients).item())


def _forward(training: Training, batch: Batch, with_dropout: bool) -> Tensor:
    """Sum of the token losses of this rank's shard of one microbatch."""

    def here(array: object) -> Tensor:
        return torch.as_tensor(array).to(training.state.device, non_blocking=True)

    samples = here(batch.samples) if with_dropout else None
    position_ids = None if batch.position_ids is None else here(batch.position_ids)
    return training.model(
        here(batch.tokens), here(batch.labels), here(batch.loss_mask), here(batch.positions), samples, position_ids
    )
