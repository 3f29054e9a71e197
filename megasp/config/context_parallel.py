"""How the ranks that share a sequence are split into Ulysses x ring, and how the ring's exchange.

With --context-parallel-size alone the split is chosen: a function of heads, kv heads, sequence and the ranks of a node,
which stand in the configuration, so every rank and every reload chooses alike.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from megasp.config.schema import Config
from megasp.errors import ConfigError

RING_MODES = ("p2p", "all_gather", "lightseq")
"""Ways of the ring axis; Ulysses (a2a) goes around any of them."""

MODES = ("a2a", "p2p", "a2a+p2p", "all_gather", "lightseq")

BETWEEN_NODES = 8
"""What a byte between nodes counts, when one inside counts 1: NVLink's measured rate over that of a GPU's network port
is 7 on H100, 9 on A100 and 14 on B200 nodes (planner/gpus)."""


@dataclass(frozen=True)
class ContextSplit:
    """Sizes of the two axes, how the ring's ranks exchange, and why these sizes (empty where the user gave them)."""

    ulysses: int
    ring: int
    ring_mode: str
    reason: str = ""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends inside its node, and to others."""

    inside: float
    between: float

    @property
    def cost(self) -> float:
        """In bytes inside a node that take as long."""
        return self.inside + BETWEEN_NODES * self.between

    def __str__(self) -> str:
        between = f" + {self.between / 2**20:.1f} between nodes" if self.between else ""
        return f"{self.inside / 2**20:.1f}{between}"


def is_chosen(config: Config) -> bool:
    """Whether the split of the context-parallel ranks is left to us."""
    parallel = config.parallel
    free = parallel.ulysses_size is None and parallel.ring_size is None
    return free and (parallel.context_parallel_size or 1) > 1 and parallel.cp_comm_type in (None, "a2a+p2p")


def on_nodes(config: Config, ranks: int | None) -> Config:
    """The configuration with the ranks of a node that the launcher tells of, where the split depends on them and the
    user did not say."""
    if ranks is None or not is_chosen(config) or config.parallel.nproc_per_node is not None:
        return config
    return replace(config, parallel=replace(config.parallel, nproc_per_node=ranks))


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
    if is_chosen(config):
        ulysses, ring, reason = _choose(config, cp or 1)
    elif ulysses is None and ring is None:
        ulysses, ring = (cp or 1, 1) if comm == "a2a" else (1, cp or 1)
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
    """The split of `cp` ranks that sends least, bytes between nodes counted for more, and the sentence that says so."""
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
    best = min(splits, key=lambda split: (sent[split].cost, -split[0]))
    others = [f"; {u} x {r}: {sent[u, r]}" for u, r in splits if (u, r) != best]
    reason = f"Ulysses {best[0]} x ring {best[1]} sends least, in MiB a layer, sample and rank: {sent[best]}"
    reason += "".join(others)
    node = config.parallel.nproc_per_node
    if node is None:
        return *best, f"{reason}; all links count alike without --nproc-per-node"
    if any(each.between for each in sent.values()):
        reason += f"; a byte between nodes of {node} ranks counts as {BETWEEN_NODES} inside"
    return *best, reason


def sent_bytes(config: Config, ulysses: int, ring: int) -> Sent:
    """What a rank sends for one layer and sample, forward and backward, with dense causal attention.

    The formulas of the two modes with every kv head copied to the Ulysses ranks that share it: two exchanges of q, k, v
    and the output, and ring - 1 hops of k, v, of k, v again and of dk, dv, which are fp32. An exchange goes to all
    ranks of its axis alike; the ring's ranks step together, at the pace of its slowest hop.
    """
    model, item = config.model, 4 if config.training.compute_dtype == "float32" else 2
    tp, node = config.parallel.tensor_model_parallel_size, config.parallel.nproc_per_node
    queries, kv = model.num_attention_heads / tp, max(1.0, model.kv_heads / tp)
    kv *= max(1.0, ulysses / kv)
    row = config.training.seq_length / (ulysses * ring) * model.head_dim
    exchanges = row * 2 * (ulysses - 1) / ulysses * (2 * queries + 2 * kv) * item
    hops = row * (ring - 1) * 2 * kv * (2 * item + 4)
    away, far = _away(ulysses, tp, node), _away(ring, tp * ulysses, node) > 0
    between = exchanges * away + hops * far
    return Sent(exchanges + hops - between, between)


def _away(size: int, stride: int, node: int | None) -> float:
    """The share of a rank's peers that are on other nodes, on an axis of `size` ranks that are `stride` apart, for the
    rank that has most of them there; nodes of `node` ranks."""
    if node is None or size == 1:
        return 0.0
    block = size * stride
    starts = (first + lane for first in range(0, math.lcm(block, node), block) for lane in range(stride))
    groups = (range(start, start + block, stride) for start in starts)
    together = min(min(Counter(rank // node for rank in group).values()) for group in groups)
    return (size - together) / (size - 1)
