"""The rules of recompute, tiles, chunks and offloading of activations: what excludes what, what would do nothing."""

from megasp.config.layout import Layout
from megasp.config.layout_rules import nearest
from megasp.config.schema import Config
from megasp.config.tiles import mlp_tiles
from megasp.errors import ConfigError


def check(config: Config, layout: Layout, device: str) -> None:
    """Refuse options that contradict each other or do nothing, and offloading on a CPU.

    Raises:
        ConfigError: the first of them.
    """
    _recompute(config)
    _distribute(config, layout)
    _tiles(config, layout)
    _chunks(config, layout, device)
    _offload(config, device)


def _recompute(config: Config) -> None:
    options = config.activations
    granularity = options.recompute_granularity
    for flag, value in (
        ("--recompute-method", options.recompute_method),
        ("--recompute-num-layers", options.recompute_num_layers),
    ):
        if value is not None and granularity is None:
            raise ConfigError(
                f"{flag} {value} without --recompute-granularity", "nothing is recomputed", f"leave {flag} out"
            )
    if options.recompute_modules and granularity != "selective":
        raise ConfigError(
            f"--recompute-modules with recompute-granularity {granularity}",
            "modules are named for selective recompute",
            "add --recompute-granularity selective",
        )
    recompute = config.activations.recompute
    if recompute.method == "uniform" and recompute.num_layers > 1 and granularity != "full":
        raise ConfigError(
            f"--recompute-num-layers {recompute.num_layers} with --recompute-granularity {granularity}",
            "groups of layers that keep one input are recomputed in full",
            "use --recompute-method block or alternate, or --recompute-granularity full",
        )
    if recompute.does("core_attn") and config.parallel.ulysses_head_chunks > 1:
        raise ConfigError(
            f"--ulysses-head-chunks {config.parallel.ulysses_head_chunks} with --recompute-modules core_attn",
            "attention made again stops at the last tensor that it needs, with the chunks' exchanges on their way",
            "use --ulysses-head-chunks 1, or another recompute",
        )


def _distribute(config: Config, layout: Layout) -> None:
    options, hidden = config.activations, config.model.hidden_size
    if not options.distribute_saved_activations:
        return
    flag = "--distribute-saved-activations"
    if options.recompute_granularity not in ("full", "all-but-attention"):
        raise ConfigError(
            f"{flag} with recompute-granularity {options.recompute_granularity}",
            "inputs of layers are what is kept where whole layers are recomputed",
            "add --recompute-granularity full",
        )
    if layout.tp == 1 or config.parallel.sequence_parallel:
        split = " and --sequence-parallel" if layout.tp > 1 else ""
        raise ConfigError(
            f"{flag} with tensor-model-parallel-size {layout.tp}{split}",
            "it shares out what several tensor-parallel ranks hold alike",
            f"leave {flag} out",
        )
    if hidden % layout.tp:
        raise ConfigError(
            f"{flag} with hidden-size {hidden} on tensor-model-parallel-size {layout.tp}",
            "every rank keeps an equal share",
            f"leave {flag} out",
        )
    if options.cpu_offloading_activations:
        raise ConfigError(
            f"{flag} with --cpu-offloading-activations",
            "the inputs of layers go to the host",
            f"leave {flag} out",
        )


def _tiles(config: Config, layout: Layout) -> None:
    tiles, budget = mlp_tiles(config, layout), config.activations.activation_tile_mb
    if tiles == 1:
        return
    by_budget = budget is not None and config.activations.tiled_mlp == 1
    option = f"--activation-tile-mb {budget}" if by_budget else f"--tiled-mlp {tiles}"
    split = layout.tp if config.parallel.sequence_parallel else 1
    positions = config.training.seq_length // layout.cp // split
    if tiles > positions:
        raise ConfigError(
            f"--tiled-mlp {tiles} on {positions} positions of a rank",
            "a tile holds at least one",
            f"use --tiled-mlp {positions}",
        )
    inner = [name for name in ("mlp", "mlp_act") if config.activations.recompute.does(name)]
    if inner:
        raise ConfigError(
            f"{option} with --recompute-modules {' '.join(inner)}",
            "a tiled MLP keeps its input alone as it is",
            f"leave {' and '.join(inner)} out",
        )
    if config.pipeline.schedule in ("zb-h1", "zbv"):
        raise ConfigError(
            f"{option} with --pipeline-schedule {config.pipeline.schedule}",
            "weight gradients that are put off keep all tiles, which tiling is to avoid",
            f"use 1f1b or interleaved, or leave {option.split()[0]} out",
        )


def _chunks(config: Config, layout: Layout, device: str) -> None:
    options, chunks = config.activations, config.activations.sequence_chunks
    if chunks == 1:
        if options.cpu_offloading_attention:
            raise ConfigError(
                "--cpu-offloading-attention without --sequence-chunks",
                "chunks are what goes to the host one by one",
                "add --sequence-chunks, or use --cpu-offloading-activations",
            )
        return
    got = f"--sequence-chunks {chunks}"
    if layout.ring > 1:
        raise ConfigError(
            f"{got} with ring-size {layout.ring}",
            "the ranks of a ring hold positions that balance their work, chunks those that follow one another",
            f"use --ulysses-size {layout.cp}, or leave --sequence-chunks out",
        )
    split = layout.tp if config.parallel.sequence_parallel else 1
    ranks, length = layout.ulysses * split, config.training.seq_length
    if length % (ranks * chunks):
        raise ConfigError(
            f"{got} of {length} tokens on {ranks} ranks that share them",
            "chunks have equally many tokens on every rank",
            f"use --sequence-chunks {nearest(chunks, lambda n: length % (ranks * n) == 0, length // ranks + 1)}",
        )
    granularity = config.activations.recompute.granularity
    if granularity not in (None, "full"):
        raise ConfigError(
            f"{got} with --recompute-granularity {granularity}",
            "a layer in chunks keeps its input and what attention gave as it is, and runs the rest again",
            "use --recompute-granularity full, or none",
        )
    if config.pipeline.schedule in ("zb-h1", "zbv"):
        raise ConfigError(
            f"{got} with --pipeline-schedule {config.pipeline.schedule}",
            "weight gradients that are put off keep all chunks, which chunks are to avoid",
            "use 1f1b or interleaved, or leave --sequence-chunks out",
        )
    if options.cpu_offloading_attention and device == "cpu":
        raise ConfigError(
            "--cpu-offloading-attention on a CPU",
            "keys and values are in the host's memory there as they are",
            "leave it out",
        )


def _offload(config: Config, device: str) -> None:
    options = config.activations
    if options.cpu_offloading_num_layers is not None and not options.cpu_offloading_activations:
        raise ConfigError(
            f"--cpu-offloading-num-layers {options.cpu_offloading_num_layers} without --cpu-offloading-activations",
            "nothing is offloaded",
            "add --cpu-offloading-activations, or leave it out",
        )
    if not options.cpu_offloading_activations:
        return
    recompute = config.activations.recompute
    kept = [name for name in ("layernorm", "mlp_act") if recompute.does(name)]
    kept += ["all-but-attention"] if recompute.granularity == "all-but-attention" else []
    if kept:
        raise ConfigError(
            f"--cpu-offloading-activations with recompute of {' and '.join(kept)}",
            "that keeps what it recomputes from on the device",
            "use --recompute-granularity full, or selective with core_attn or mlp, or none",
        )

    if device == "cpu":
        raise ConfigError(
            "--cpu-offloading-activations on a CPU",
            "activations are in the host's memory there as they are",
            "leave it out, or use --recompute-granularity full or --tiled-mlp",
        )
