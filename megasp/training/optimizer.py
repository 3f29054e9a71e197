"""AdamW (arXiv 1711.05101) on master weights: matrices decay, biases and norm weights do not."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from megasp.config.schema import OptimizerConfig

ENDS = ("embedding.weight", "head.weight")
"""The weights that --decoupled-lr is for; tied to the head, the embedding is both."""

FUSED_ADAM = {"apex": "apex.optimizers", "transformer-engine": "transformer_engine.pytorch.optimizers"}
"""Kernel -> module of its FusedAdam. They count steps by group, PyTorch by parameter."""


def build_optimizer(
    masters: Sequence[nn.Parameter], config: OptimizerConfig, kernel: str = "torch"
) -> torch.optim.Optimizer:
    """AdamW, its state in place from the start so that a checkpoint can fill it.

    Its groups are weights that decay and weights that do not, and with a rate of their own the `ENDS`, first.

    Args:
        kernel: "torch", PyTorch's fused AdamW, or one of `FUSED_ADAM`, which is installed.
    """
    sorted_masters: dict[str, list[nn.Parameter]] = {"ends": [], "decaying": [], "others": []}
    for master in masters:
        piece = master.pieces[0]  # type: ignore[attr-defined]
        own_rate = config.decoupled_lr is not None and piece.name in ENDS
        sorted_masters["ends" if own_rate else "decaying" if piece.decay else "others"].append(master)
    ends = {"params": sorted_masters["ends"], "weight_decay": config.weight_decay, "decoupled": True}
    groups: list[dict[str, Any]] = [
        *([ends] if sorted_masters["ends"] else []),
        {"params": sorted_masters["decaying"], "weight_decay": config.weight_decay},
        {"params": sorted_masters["others"], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    optimizer: torch.optim.Optimizer
    if kernel == "torch":
        optimizer = torch.optim.AdamW(groups, config.lr or 0.0, fused=True, **options)
    else:
        # apex takes no group without parameters, as a rank may have where weights are sharded.
        groups = [group | {"step": 0} for group in groups if group["params"]]
        fused_adam = import_module(FUSED_ADAM[kernel]).FusedAdam
        optimizer = fused_adam(groups, lr=config.lr or 0.0, adam_w_mode=True, **options)
    for parameter in masters:
        step = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} if kernel == "torch" else {}
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimizer.state[parameter] = step | moments
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, decoupled_lr: float | None = None) -> None:
    """Set the rate of the next step; where `ENDS` have their own, it is `decoupled_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr if decoupled_lr is None or not group.get("decoupled") else decoupled_lr


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps that changed the weights: fewer than the run's where some had no finite gradient."""
    return max((int(place["step"]) for place in _counters(optimizer)), default=0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which Adam's bias correction reads."""
    for place in _counters(optimizer):
        place["step"] = torch.full_like(place["step"], step) if isinstance(place["step"], torch.Tensor) else step


def _counters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Where steps are counted: with each parameter's state, or in each group."""
    return [place for place in (*optimizer.state.values(), *optimizer.param_groups) if "step" in place]
