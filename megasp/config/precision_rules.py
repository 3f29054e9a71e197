"""The rules of precision: dtypes of a run, its loss scale, and fp8."""

import dataclasses

from megasp.config.fp8 import BACKENDS, BLOCKED_RECIPES, RECIPES, UNSERVED_RECIPES
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.config.tiles import mlp_tiles
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


FP8_MULTIPLE, BLOCK_MULTIPLE = 16, 128
"""What every dim of an fp8 product must be a multiple of: tensor cores read 16 bytes at a time, scales of blocks are
laid out for them in tiles of 128 rows."""


def check_fp8(config: Config, layout: Layout, device: str) -> None:
    """Refuse fp8 options that do nothing, recipes that are not served, and products of sizes that kernels refuse."""
    fp8, layers = config.fp8, config.model.num_layers
    if fp8.fp8_format is None:
        return
    if not config.training.bf16:
        raise ConfigError(
            f"--fp8-format {fp8.fp8_format} without --bf16",
            "fp8 products take bfloat16 activations and give bfloat16",
            "add --bf16",
        )
    if fp8.recipe not in RECIPES:
        reason = UNSERVED_RECIPES.get(fp8.recipe, f"a recipe is one of {', '.join(RECIPES)}")
        raise ConfigError(f"--fp8-recipe {fp8.recipe}", reason, "use --fp8-recipe tensorwise")
    if fp8.backend != "auto" and fp8.recipe not in BACKENDS[fp8.backend]:
        raise ConfigError(
            f"--fp8-backend {fp8.backend} with --fp8-recipe {fp8.recipe}",
            f"it has {', '.join(BACKENDS[fp8.backend])} alone",
            "use --fp8-backend torch",
        )
    if fp8.backend == "transformer-engine" and device == "cpu":
        raise ConfigError(
            f"--fp8-backend {fp8.backend}", "it runs on cuda, not on cpu", "use --fp8-backend auto, which emulates"
        )
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(fp8, name) is not None and not fp8.first_last_layers_bf16:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} {getattr(fp8, name)} without --first-last-layers-bf16",
                "it would do nothing",
                f"add --first-last-layers-bf16, or leave {option} out",
            )
    if not fp8.layers(layers):
        raise ConfigError(
            f"--first-last-layers-bf16 with num-layers {layers}",
            "it leaves no layer for --fp8-format",
            "leave --fp8-format out, or fewer layers in bfloat16",
        )
    _check_fp8_sizes(config, layout)


def _check_fp8_sizes(config: Config, layout: Layout) -> None:
    model, training = config.model, config.training
    heads, kv_heads = (max(1, count // layout.tp) for count in (model.num_attention_heads, model.kv_heads))
    split = layout.tp if config.parallel.sequence_parallel else 1
    positions = training.seq_length // layout.cp // split
    chunk = positions // config.activations.sequence_chunks
    tile = -(-chunk // -(-mlp_tiles(config, layout) // config.activations.sequence_chunks))
    # Scales of blocks are gathered with a rank's part of the sequence, so none may lie in two.
    multiple = BLOCK_MULTIPLE if config.fp8.recipe in BLOCKED_RECIPES else FP8_MULTIPLE
    tokens = (1 if config.fp8.recipe in BLOCKED_RECIPES else split) * training.micro_batch_size
    width = "a smaller --tensor-model-parallel-size, or another width"
    tiles = "another --tiled-mlp or --activation-tile-mb"
    sizes = {
        "hidden-size": (model.hidden_size, "another --hidden-size"),
        "a rank's part of q, k and v": ((heads + 2 * kv_heads) * model.head_dim, width),
        "a rank's part of attention's output": (heads * model.head_dim, width),
        "a rank's part of the MLP's hidden layer": (model.mlp_size // layout.tp, width),
        "a rank's tokens of a microbatch": (positions * tokens, "another --seq-length or --micro-batch-size"),
        "a chunk's tokens": (chunk * tokens, "another --sequence-chunks"),
        "a tile's tokens": (tile * tokens, tiles),
        "the last tile's tokens": ((chunk % tile or tile) * tokens, tiles),
    }
    for name, (size, fix) in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"--fp8-format with {name}, {size}",
                f"fp8 products with {config.fp8.recipe} scales need every size to be a multiple of {multiple}",
                f"use {fix}, or leave --fp8-format out",
            )
