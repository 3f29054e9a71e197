"""Tiles by a budget: how many --activation-tile-mb makes of the MLP, and how large the head's logits may be. Pure."""

from megasp.config.layout import Layout
from megasp.config.schema import Config

MEGABYTE = 2**20


def mlp_tiles(config: Config, layout: Layout) -> int:
    """Tiles of a rank's sequence in which each MLP is computed: --tiled-mlp where it is given, or as many as keep a
    tile's hidden layer, with the activation's output, within the budget."""
    activations, model, training = config.activations, config.model, config.training
    if activations.activation_tile_mb is None or activations.tiled_mlp > 1:
        return activations.tiled_mlp
    split = layout.tp if config.parallel.sequence_parallel else 1
    positions = training.seq_length // layout.cp
    item = 4 if training.compute_dtype == "float32" else 2
    hidden = model.mlp_size // layout.tp * (3 if model.swiglu else 2) * item * training.micro_batch_size
    return min(max(1, positions // split), -(-positions * hidden // (activations.activation_tile_mb * MEGABYTE)))


def head_bytes(config: Config) -> int | None:
    """Bytes of the logits that exist at a time; the loss's own choice without a budget."""
    budget = config.activations.activation_tile_mb
    return None if budget is None else budget * MEGABYTE
