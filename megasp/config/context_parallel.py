"""How the ranks that share a sequence are split into Ulysses x ring, and how the ring's exchange."""

from dataclasses import dataclass

from megasp.config.schema import Config
from megasp.errors import ConfigError

RING_MODES = ("p2p", "all_gather", "lightseq")
"""Ways of the ring axis; Ulysses (a2a) goes around any of them."""

MODES = ("a2a", "p2p", "a2a+p2p", "all_gather", "lightseq")


@dataclass(frozen=True)
class ContextSplit:
    """Sizes of the two axes, how the ring's ranks exchange, and why these sizes (empty where the user gave them)."""

    ulysses: int
    ring: int
    ring_mode: str
    reason: str = ""


def split_context(config: Config) -> ContextSplit:
    """The split that --context-parallel-size, --cp-comm-type, --ulysses-size and --ring-size mean.

    Raises:
        ConfigError: they contradict each other.
    """
    parallel = config.parallel
    cp, comm, ulysses, ring = (
        parallel.context_parallel_size,
        parallel.cp_comm_type,
        parallel.ulysses_size,
        parallel.ring_size,
    )
    ring_mode = comm if comm in RING_MODES else "p2p"
    reason = ""
    if ulysses is None and ring is None:
        cp = cp or 1
        if comm is None or comm == "a2a+p2p":
            ulysses, ring, reason = _choose(config, cp)
        else:
            ulysses, ring = (cp, 1) if comm == "a2a" else (1, cp)
    ulysses = ulysses or max(1, (cp or 1) // (ring or 1))
    ring = ring or max(1, (cp or 1) // ulysses)
    _check(cp, comm, ulysses, ring)
    return ContextSplit(ulysses, ring, ring_mode, reason)


def _check(cp: int | None, comm: str | None, ulysses: int, ring: int) -> None:
    if comm not in (None, *MODES):
        raise ConfigError(f"cp-comm-type {comm}", f"it is one of {', '.join(MODES)}", "use a2a (Ulysses)")
    sizes = f"ulysses-size {ulysses} and ring-size {ring}"
    if cp is not None and ulysses * ring != cp:
        raise ConfigError(
            f"context-parallel-size {cp}, ulysses-size {ulysses}, ring-size {ring}",
            "the context-parallel size is the product of the other two",
            f"use --context-parallel-size {ulysses * ring}, or leave it out",
        )
    if comm == "a2a" and ring > 1:
        raise ConfigError(
            f"cp-comm-type a2a with {sizes}",
            "a2a is Ulysses alone",
            "leave it out, or say a2a+p2p, or use --ring-size 1",
        )
    if comm in RING_MODES and ring == 1 and ulysses > 1:
        raise ConfigError(
            f"cp-comm-type {comm} with {sizes}", "it is how the ring's ranks exchange", "use --cp-comm-type a2a"
        )


def _choose(config: Config, cp: int) -> tuple[int, int, str]:
    """The split of `cp` ranks that sends least, and the sentence that says so."""
    heads = max(1, config.model.num_attention_heads // config.parallel.tensor_model_parallel_size)
    both = config.parallel.cp_comm_type == "a2a+p2p" and cp > 1
    splits = [(u, cp // u) for u in range(1, cp + 1) if cp % u == 0 and u <= heads]
    splits = [(u, r) for u, r in splits if not both or (u > 1 and r > 1)]
    if not splits:
        raise ConfigError(
            f"context-parallel-size {cp} with cp-comm-type a2a+p2p and {heads} query heads on a rank",
            "both take at least 2 ranks, and Ulysses at most one per head",
            "use --cp-comm-type p2p, or another size",
        )
    sent = {split: sent_bytes(config, *split) for split in splits}
    best = min(splits, key=lambda split: (sent[split], -split[0]))
    others = ", ".join(f"{u} x {r}: {sent[u, r] / 2**20:.1f}" for u, r in splits if (u, r) != best)
    reason = f"Ulysses {best[0]} x ring {best[1]} sends least, {sent[best] / 2**20:.1f} MiB a layer, sample and rank"
    return *best, reason + (f" ({others})" if others else "")


def sent_bytes(config: Config, ulysses: int, ring: int) -> float:
    """Bytes that a rank sends for one layer and sample, forward and backward, with dense causal attention.

    The formulas of the two modes with every kv head copied to the Ulysses ranks that share it: two exchanges of q, k, v
    and the output, and ring - 1 hops of k, v, of k, v again and of dk, dv, which are fp32.
    """
    model, item = config.model, 4 if config.training.compute_dtype == "float32" else 2
    tp = config.parallel.tensor_model_parallel_size
    queries, kv = model.num_attention_heads / tp, max(1.0, model.kv_heads / tp)
    kv *= max(1.0, ulysses / kv)
    tokens = config.training.seq_length / (ulysses * ring)
    exchange = 2 * (ulysses - 1) / ulysses * (2 * queries + 2 * kv) * item
    return tokens * model.head_dim * (exchange + (ring - 1) * 2 * kv * (2 * item + 4))
