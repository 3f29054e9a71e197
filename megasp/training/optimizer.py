"""AdamW (arXiv 1711.05101) on master weights: matrices decay, biases and norm weights do not."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from megasp.config.schema import OptimizerConfig

FUSED_ADAM = {"apex": "apex.optimizers", "transformer-engine": "transformer_engine.pytorch.optimizers"}
"""Kernel -> module of its FusedAdam. They count steps by group, PyTorch by parameter."""


def build_optimizer(
    masters: Sequence[nn.Parameter], config: OptimizerConfig, kernel: str = "torch"
) -> torch.optim.Optimizer:
    """AdamW over two groups, its state in place from the start so that a checkpoint can fill it.

    Args:
        kernel: "torch", PyTorch's fused AdamW, or one of `FUSED_ADAM`, which is installed.
    """
    decaying = [p for p in masters if p.pieces[0].decay]  # type: ignore[attr-defined]
    others = [p for p in masters if not p.pieces[0].decay]  # type: ignore[attr-defined]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


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
