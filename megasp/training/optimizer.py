"""AdamW (arXiv 1711.05101) on master weights: matrices decay, biases and norm weights do not."""

from collections.abc import Sequence

import torch
from torch import nn

from megasp.config.schema import OptimizerConfig

ENDS = ("embedding.weight", "head.weight")
"""The weights that --decoupled-lr is for; tied to the head, the embedding is both."""


def build_optimizer(masters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW, its state in place from the start so that a checkpoint can fill it.

    Its groups are weights that decay and weights that do not, and with a rate of their own the `ENDS`, first.
    """
    groups: dict[str, list[nn.Parameter]] = {"ends": [], "decaying": [], "others": []}
    for master in masters:
        piece = master.pieces[0]  # type: ignore[attr-defined]
        own_rate = config.decoupled_lr is not None and piece.name in ENDS
        groups["ends" if own_rate else "decaying" if piece.decay else "others"].append(master)
    ends = {"params": groups["ends"], "weight_decay": config.weight_decay, "decoupled": True}
    optimizer = torch.optim.AdamW(
        [
            *([ends] if groups["ends"] else []),
            {"params": groups["decaying"], "weight_decay": config.weight_decay},
            {"params": groups["others"], "weight_decay": 0.0},
        ],
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, decoupled_lr: float | None = None) -> None:
    """Set the rate of the next step; where `ENDS` have their own, it is `decoupled_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr if decoupled_lr is None or not group.get("decoupled") else decoupled_lr


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps that changed the weights: fewer than the run's where some had no finite gradient."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which Adam's bias correction reads."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
