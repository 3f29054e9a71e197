"""The rules of a layout: ranks that the axes multiply up to, and what each axis must divide."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megasp.config.context_parallel import split_context
from megasp.config.heads import most_chunks
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.errors import ConfigError


def nearest(value: int, works: Callable[[int], bool], limit: int | None = None) -> str:
    """The nearest numbers below and above `value` (up to `limit`) that `works`, as words: "6 or 8"."""
    limit = limit or 2 * value + (1 << 20)
    below = next((n for n in range(value, 0, -1) if works(n)), None)
    above = next((n for n in range(value + 1, limit) if works(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout of a configuration on so many ranks; refused if the axes do not multiply up to them."""
    parallel = config.parallel
    context = split_context(config)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ranks = tp * pp * context.ulysses * context.ring
    if world_size % ranks:
        raise ConfigError(
            f"tensor {tp} x pipeline {pp} x Ulysses {context.ulysses} x ring {context.ring} = {ranks} "
            f"on {world_size} ranks",
            "the product must divide the number of ranks",
            f"start {nearest(world_size, lambda n: n % ranks == 0)} ranks, or {_other_size(config, world_size)}",
        )
    dp, outer = world_size // ranks, parallel.num_distributed_optimizer_instances
    if dp % outer:
        raise ConfigError(
            f"num-distributed-optimizer-instances {outer} on data-parallel size {dp}",
            "each replica is sharded over equally many ranks",
            f"use {nearest(outer, lambda n: dp % n == 0, dp + 1)}",
        )
    return Layout(pp, outer, dp // outer, context.ring, context.ulysses, tp, parallel.zero_stage)


def _other_size(config: Config, world_size: int) -> str:
    """The nearest sizes of one axis that suit so many ranks and pass the other rules, as what to do."""
    for name in ("ring_size", "ulysses_size", "context_parallel_size", "tensor_model_parallel_size"):

        def works(size: int, name: str = name) -> bool:
            if world_size % size:
                return False
            changed: dict[str, Any] = {name: size}
            other = replace(config, parallel=replace(config.parallel, **changed))
            try:
                check_splits(other, layout_of(other, world_size))
            except ConfigError:
                return False
            return True

        given = getattr(config.parallel, name) or 1
        sizes = nearest(given, works, world_size + 1) if given > 1 and world_size % given else ""
        if sizes:
            return f"use --{name.replace('_', '-')} {sizes}"
    return "change a size"


def check_splits(config: Config, layout: Layout) -> None:
    """What each axis must divide."""
    model, seq, tp, ulysses = config.model, config.training.seq_length, layout.tp, layout.ulysses
    heads, kv_heads = model.num_attention_heads, model.kv_heads

    vocab = 0 if model.vocab_size is None else model.padded_vocab_size

    def shared(size: int) -> bool:
        return kv_heads % size == 0 or size % kv_heads == 0

    def works(size: int) -> bool:
        return not (heads % size or model.mlp_size % size or vocab % size) and shared(size)

    def must(ok: bool, got: str, rule: str, fix: str) -> None:
        if not ok:
            raise ConfigError(got, rule, fix)

    on_tp = f"on tensor-model-parallel-size {tp}"
    fix = f"use a size of {nearest(tp, works, heads + 1)}"
    sizes = {"num-attention-heads": heads, "ffn-hidden-size": model.mlp_size, "padded vocabulary": vocab}
    for name, size in sizes.items():
        must(size % tp == 0, f"{name} {size} {on_tp}", "tensor-model-parallel-size must divide it", fix)
    must(shared(tp), f"num-query-groups {kv_heads} {on_tp}", "one must divide the other", fix)
    local = heads // tp
    must(
        ulysses <= local,
        f"ulysses-size {ulysses} with {local} query heads per tensor-parallel rank ({heads} / {tp})",
        "each Ulysses rank holds at least one head",
        f"use --ulysses-size {max(n for n in range(1, local + 1) if layout.cp % n == 0)}, and --ring-size for the rest",
    )
    chunks, kv_local = config.parallel.ulysses_head_chunks, max(1, kv_heads // tp)
    most = most_chunks(local, kv_local, ulysses, between_kv=layout.ring > 1) if ulysses > 1 else 1
    must(
        chunks <= most,
        f"ulysses-head-chunks {chunks} with ulysses-size {ulysses} and ring-size {layout.ring}",
        "a chunk is at least one of a Ulysses rank's query heads, and with a ring one of its kv heads",
        f"use --ulysses-head-chunks {most}",
    )
    ranks = layout.cp * (tp if config.parallel.sequence_parallel else 1)
    must(
        seq % ranks == 0,
        f"seq-length {seq} over {ranks} ranks (context parallel {layout.cp}"
        + (f" x tensor parallel {tp}, with sequence parallelism)" if ranks != layout.cp else ")"),
        "every rank must hold equally many tokens",
        f"use --seq-length {nearest(seq, lambda n: n % ranks == 0)}",
    )


def check_sharding(config: Config) -> None:
    """Refuse sharding of optimizer states, gradients and weights that contradicts the rest of the layout."""
    parallel = config.parallel
    if parallel.num_distributed_optimizer_instances > 1 and not parallel.zero_stage:
        raise ConfigError(
            f"--num-distributed-optimizer-instances {parallel.num_distributed_optimizer_instances} without sharding",
            "an instance is a replica whose ranks share out its optimizer states",
            "add --use-distributed-optimizer, or leave it out",
        )
    if parallel.zero_stage == 2 and config.pipeline.defers_weight_gradients:
        raise ConfigError(
            f"--data-parallel-sharding-strategy optim_grads with --pipeline-schedule {config.pipeline.schedule}",
            "deferred weight gradients are reduced at the end of the step, which is ZeRO-1 in disguise",
            "use --data-parallel-sharding-strategy optim, or --pipeline-schedule 1f1b",
        )
