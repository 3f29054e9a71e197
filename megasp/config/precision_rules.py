"""The rules of precision: dtypes of a run, and its loss scale."""

import dataclasses

from megasp.config.schema import Config
from megasp.errors import ConfigError


def check_precision(config: Config) -> None:
    """Refuse dtypes that exclude each other, and a loss scale that nothing uses or that cannot be."""
    training, scaling = config.training, config.loss_scaling
    if training.bf16 and training.fp16:
        raise ConfigError("--bf16 and --fp16", "a run computes in one of them", "leave --fp16 out")
    if training.grad_reduce_in_bf16 and not training.bf16:
        raise ConfigError("--grad-reduce-in-bf16 without --bf16", "it is for gradients in bfloat16", "leave it out")
    if training.grad_reduce_in_bf16 and training.weight_gradient_dtype == "fp32":
        raise ConfigError(
            "--weight-gradient-dtype fp32 with --grad-reduce-in-bf16",
            "gradients that are added in bfloat16 are made in it",
            "leave one out",
        )
    given = [field.name for field in dataclasses.fields(scaling) if getattr(scaling, field.name) is not None]
    option = f"--{given[0].replace('_', '-')}" if given else ""
    if given and not training.fp16:
        raise ConfigError(f"{option} without --fp16", "it would do nothing", f"add --fp16, or leave {option} out")
    if scaling.loss_scale is not None and len(given) > 1:
        option = f"--{given[1].replace('_', '-')}"
        raise ConfigError(f"--loss-scale with {option}", "a constant scale does not change", f"leave {option} out")
    if scaling.smallest > scaling.initial:
        raise ConfigError(
            f"min-loss-scale {scaling.smallest:g} and initial-loss-scale {scaling.initial:g}",
            "the loss scale begins at its smallest or above",
            f"use --min-loss-scale {scaling.initial:g}",
        )
