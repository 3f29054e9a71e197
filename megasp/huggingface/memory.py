"""Savers of activation memory, hung around a transformers model from outside.

Tiled MLP and offload of what checkpointing keeps: Arctic Long Sequence Training, arXiv 2506.13996 sections 3.1, 3.3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from megasp.errors import ConfigError


def tile_mlps(model: PreTrainedModel, rows: int) -> None:
    """Let the MLP of every decoder layer work on `rows` tokens at a time, forward and backward.

    Each tile keeps its input alone and is computed again in the backward, so that the wide activations of one tile
    exist at a time, whatever the length.

    Raises:
        ConfigError: the model has no MLP of its own in each layer.
    """
    config = model.config.get_text_config()
    experts = next(
        (name for name in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, name, 0)), ""
    )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlps = [mlp for layer in layers if isinstance(mlp := getattr(layer, "mlp", None), nn.Module)]
    if experts or not layers or len(mlps) < len(layers):
        raise ConfigError(
            f"tiled_mlp with {type(model).__name__}" + (f" ({experts} {getattr(config, experts)})" if experts else ""),
            "each decoder layer must have a dense MLP named mlp",
            "leave tiled_mlp out",
        )
    for mlp in mlps:
        mlp.forward = _tiled(mlp.forward, rows)


def _tiled(forward: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """The same function of [B, S, D], computed for `rows` of the S tokens at a time."""

    def tiles(x: Tensor) -> Tensor:
        parts = x.split(rows, 1)
        if len(parts) == 1:
            return forward(x)
        if not torch.is_grad_enabled():
            return torch.cat([forward(part) for part in parts], 1)
        return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], 1)

    return tiles


class Offload:
    """Keeps what the layers of a checkpointed model save, their inputs, in the host's memory until the backward.

    Args:
        model: whose decoder it is hung around.
    Raises (in the model's forward):
        ConfigError: the model does not checkpoint its layers, so that all activations would travel.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._open: list[torch.autograd.graph.save_on_cpu] = []
        model.base_model.register_forward_pre_hook(self._begin)
        model.base_model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or not module.training:
            return
        if not any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules()):
            raise ConfigError(
                "activation_offload without gradient checkpointing",
                "it moves what checkpointing keeps of each layer",
                "call model.gradient_checkpointing_enable(), or give Trainer gradient_checkpointing=True",
            )
        self._open.append(torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()))
        self._open[-1].__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
