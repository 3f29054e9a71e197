"""AdamW (arXiv 1711.05101) on master weights: matrices decay, biases and norm weights do not."""

from collections.abc import Sequence

import torch
from torch import nn

from megasp.config.schema import OptimizerConfig


def build_optimizer(masters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW over two groups, its state in place from the start so that a checkpoint can fill it."""
    decaying = [p for p in masters if p.pieces[0].decay]  # type: ignore[attr-defined]
    others = [p for p in masters if not p.pieces[0].decay]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr or 0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    for parameter in masters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps that changed the weights: fewer than the run's where some had no finite gradient."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which Adam's bias correction reads."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
