"""Seconds of one transformer layer on one rank and one microbatch, by component and direction.

Directions are those of the pipeline's actions: F forward, I gradient of the input (with the recompute before it), W
gradients of the weights. Communication counts as far as it is exposed; what runs behind compute slows it a little.

Volumes are those of sequence_parallel/traffic.py and docs/parallelism.md, dense and causal with even heads, in bytes
that a rank sends; t tokens of the microbatch on this rank, d hidden size, q and kv widths of a tensor-parallel rank:

    tensor parallel, split sequence     F  2 all-gathers, 2 reduce-scatters of t d     B  the same and 2 all-gathers
    tensor parallel, whole sequence     F  2 all-reduces of t d                        B  the same
    Ulysses                             F  all-to-all of t (2 q + 2 kv)                B  the same
    ring, all-gather                    F  (R - 1) t 2 kv                              B  that, and dk, dv in fp32
    LightSeq                            (3R/8 - 1/4) times k, v and (R/8 - 1/4) times q, out in place of R - 1
    ZeRO-3                              F  all-gather of the layer's weights           B  that, and a reduce-scatter
"""

from dataclasses import dataclass

from megasp.planner.job import Job
from megasp.planner.rates import Group, Rates

Parts = dict[str, float]
"""Component -> seconds."""

COMPONENTS = (
    "matmul", "attention", "elementwise", "overhead", "recompute", "tensor", "ulysses", "ring", "zero", "offload",
    "data", "optimizer", "imbalance", "pipeline",
)  # fmt: skip
"""Every component of a step's time, in the order of reports."""

SCORE_BYTES = {"unfused": (11, 14), "fused softmax": (8, 9)}
"""Attention that has its scores in memory -> bytes read and written for one beside the products, forward and backward:
operations of their own; Megatron-LM's softmax, which scales and masks (3 forward, 4 backward, for it reads the unmasked
half alone), and dropout (5 and 5)."""


@dataclass(frozen=True)
class Work:
    """Compute of a layer in one direction, in seconds, by where it is (the places of `Redone`)."""

    core_attention: float = 0.0
    attention_linears: float = 0.0
    mlp: float = 0.0
    elementwise: float = 0.0

    @property
    def seconds(self) -> float:
        return self.core_attention + self.attention_linears + self.mlp + self.elementwise

    def parts(self) -> Parts:
        return {
            "matmul": self.attention_linears + self.mlp,
            "attention": self.core_attention,
            "elementwise": self.elementwise,
        }


def groups(job: Job) -> dict[str, Group]:
    """The ranks that each axis spans on the machine."""
    layout = job.layout
    tp, ulysses, ring = layout.tp, layout.ulysses, layout.ring
    return {
        "tp": Group(tp, 1),
        "ulysses": Group(ulysses, tp),
        "ring": Group(ring, tp * ulysses),
        "shard": Group(layout.cp * layout.dp_inner, tp),
        "replicas": Group(layout.dp_outer, tp * layout.cp * layout.dp_inner),
    }


def layer_parts(job: Job, rates: Rates) -> dict[str, Parts]:
    """F, I and W of a layer."""
    compute = {kind: _work(job, rates, kind) for kind in "FIW"}
    tensor = _tensor(job, rates)
    ulysses, ring = _ulysses(job, rates), _ring(job, rates, compute)
    made = {kind: compute[kind].parts() for kind in "FIW"}
    for kind in "FI":
        made[kind] |= {
            "overhead": rates.fit.layer_seconds,
            "tensor": tensor[kind],
            "ulysses": ulysses[kind],
            "ring": ring[kind],
        }
    gathered = job.recompute.gathers * rates.collective(groups(job)["tp"], 2.0 * job.tokens * job.model.hidden_size)
    made["I"]["recompute"] = _recompute(job, compute["F"], made["F"]) + gathered
    for kind, size in _offloaded(job).items():
        made[kind]["offload"] = max(0.0, rates.host(size) - sum(made[kind].values()))
    if job.zero == 3:
        _zero3(job, rates, made)
    return made


def _offloaded(job: Job) -> Parts:
    """Bytes to or from the host that compute must hide: a layer's input; and of chunks that read the keys and values of
    those before them a block for each pair, in the backward with the sums of its gradients in fp32."""
    stream = 2 * job.tokens * job.model.hidden_size * job.offload_activations
    blocks = (job.offload_attention + 1) / 2 * (job.offload_attention > 1)
    block = 2 * job.tokens * _widths(job)[1]
    return {"F": stream + blocks * block, "I": stream + 3 * blocks * block}


def _work(job: Job, rates: Rates, kind: str) -> Work:
    model, tokens, tp = job.model, job.tokens, job.layout.tp
    hidden, mlp = model.hidden_size, model.mlp_size / tp
    queries = model.num_attention_heads / tp * model.head_dim
    qkv = queries + 2 * max(model.kv_heads / tp, 1) * model.head_dim
    share = job.fp8_share

    def product(features_out: float, features_in: float) -> float:
        sizes = {
            "F": (tokens, features_out, features_in),
            "I": (tokens, features_in, features_out),
            "W": (features_out, features_in, tokens),
        }
        plain = rates.matmul(*sizes[kind])
        fp8 = rates.matmul(*sizes[kind], "fp8") if share else 0.0
        return share * fp8 + (1 - share) * plain

    return Work(
        core_attention=_attention(job, rates, kind == "I") if kind != "W" else 0.0,
        attention_linears=product(qkv, hidden) + product(hidden, queries),
        mlp=product(mlp * (2 if model.swiglu else 1), hidden) + product(hidden, mlp),
        elementwise=rates.memory(_elementwise_bytes(job, rates, kind)),
    )


def _attention(job: Job, rates: Rates, backward: bool) -> float:
    """Scores and mix of this rank's heads; the ring's blocks are halves of a rank's tokens, as zigzag makes them."""
    model, layout = job.model, job.layout
    length, seen = job.seq_length, job.seq_length / 2
    if model.window_size is not None and model.window_size < length:
        seen = model.window_size * (1 - model.window_size / (2 * length))
    width = model.num_attention_heads / layout.tp * model.head_dim
    flops = 4 * job.tokens * width * seen
    if job.software.attention in SCORE_BYTES:  # the whole square, in matrix products
        heads = job.tokens * model.num_attention_heads / layout.tp
        products = 2 * rates.matmul(heads, length, model.head_dim) * (2 if backward else 1)
        return products + rates.memory(heads * length * SCORE_BYTES[job.software.attention][backward])
    block = length / (2 * layout.ring) if layout.ring > 1 else length
    return rates.attention(job.software.attention, flops * (2.5 if backward else 1), backward, model.head_dim, block)


def _elementwise_bytes(job: Job, rates: Rates, kind: str) -> float:
    """Bytes that norms, residuals, rotary positions, the activation, and fp8 casts read and write."""
    model, tp = job.model, job.layout.tp
    if kind == "W":
        return job.software.accumulate_bytes * job.layer_parameters
    split = tp if job.sequence_parallel else 1
    queries = model.num_attention_heads / tp * model.head_dim
    kv = max(model.kv_heads / tp, 1) * model.head_dim
    mlp = model.mlp_size / tp
    residual = 10 * model.hidden_size / split  # two norms (read, write) and two residual adds (read twice, write)
    rotary = 2 * (queries + kv) if model.position_embedding_type == "rope" else 0
    activation = 3 * mlp if model.swiglu else 2 * mlp
    dropout = 4 * model.hidden_size / split if model.hidden_dropout else 0
    elements = residual + rotary + activation + dropout
    if kind == "I":
        elements *= 1.5  # the gradient comes in besides what was kept
    size = 2 * elements * (1.0 if job.software.fused else rates.fit.unfused)
    widths = 2 * model.hidden_size + queries + mlp
    if kind == "I":
        widths = queries + 2 * kv + 2 * model.hidden_size + mlp * (2 if model.swiglu else 1)
    casts = job.software.cast_bytes * job.tokens * widths + job.software.cast_weight_bytes * job.layer_parameters
    return job.tokens * size + job.fp8_share * casts


def _tensor(job: Job, rates: Rates) -> Parts:
    """Exposed tensor-parallel communication."""
    group = groups(job)["tp"]
    size = 2.0 * job.tokens * job.model.hidden_size
    if job.sequence_parallel:
        one = rates.collective(group, size)
        narrow = rates.collective(group, job.software.gather_bytes * size / 2)
        inputs = job.fp8_share * narrow + (1 - job.fp8_share) * one  # of the two column-parallel layers
        seconds = {"F": 2 * inputs + 2 * one, "I": 2 * inputs + 4 * one}
    else:
        one = rates.collective(group, size, "reduce")
        seconds = {"F": 2 * one, "I": 2 * one}
    for kind, direction in (("F", "forward"), ("I", "backward")):
        if direction in job.software.overlap_tensor:
            hidden = seconds[kind] * rates.fit.hidden_tensor
            seconds[kind] += hidden * (rates.fit.contention - 1)
    return seconds


def _widths(job: Job) -> tuple[float, float]:
    """Bytes of a token's queries and of its keys (as many as its values) on one tensor-parallel rank."""
    model, tp = job.model, job.layout.tp
    kv = max(model.kv_heads / tp, 1)
    kv *= max(1.0, job.layout.ulysses / kv)  # each Ulysses rank has a kv head at least
    return 2 * model.num_attention_heads / tp * model.head_dim, 2 * kv * model.head_dim


def _ulysses(job: Job, rates: Rates) -> Parts:
    group = groups(job)["ulysses"]
    queries, kv = _widths(job)
    there = rates.collective(group, job.tokens * (queries + 2 * kv), "exchange")
    back = rates.collective(group, job.tokens * queries, "exchange")
    return {"F": there + back, "I": there + back}


def _ring(job: Job, rates: Rates, compute: dict[str, Work]) -> Parts:
    """Messages fly while blocks compute; what is longer than they are is exposed."""
    ring, group = job.layout.ring, groups(job)["ring"]
    if ring == 1:
        return {"F": 0.0, "I": 0.0}
    queries, kv = _widths(job)
    wide = job.software.partial_bytes / 2  # sums of gradients, in bf16 elements
    if job.ring_mode == "lightseq":
        keys, helped = 3 * ring / 8 - 0.25, ring / 8 - 0.25
        there, back = 2 * queries, (3 + wide) * queries
    else:
        keys, helped, there, back = ring - 1.0, 0.0, 0.0, 0.0
    volume = {"F": keys * 2 * kv + helped * there, "I": keys * (2 + 2 * wide) * kv + helped * back}
    made = {}
    for kind in "FI":
        seconds = ring * rates.message(volume[kind] * job.tokens / ring, group.stride, ring)
        behind = compute[kind].core_attention * (ring - 1) / ring
        hidden = min(seconds, behind)
        made[kind] = seconds - hidden + rates.fit.contention * hidden
    return made


def _recompute(job: Job, forward: Work, forward_parts: Parts) -> float:
    """Shares of the forward that run again, with its communication where whole layers do."""
    again = job.recompute
    seconds = (
        again.core_attention * forward.core_attention
        + again.attention_linears * forward.attention_linears
        + again.mlp * forward.mlp
        + again.elementwise * forward.elementwise
    )
    linears = (again.attention_linears + again.mlp) / 2
    seconds += linears * (forward_parts["tensor"] + forward_parts["overhead"])
    return seconds + again.core_attention * (forward_parts["ulysses"] + forward_parts["ring"])


def _zero3(job: Job, rates: Rates, made: dict[str, Parts]) -> None:
    """Weights are gathered one layer ahead of forward and backward, and gradients scattered behind the backward; shards
    that are on the host come from there, and gradients go there."""
    group, weights = groups(job)["shard"], job.layer_parameters
    gather = rates.collective(group, 2.0 * weights)
    reduce = rates.collective(group, job.software.gradient_bytes * weights)
    if job.offload_weights:
        copy = rates.host(4.0 * weights / group.size)
        gather, reduce = gather + copy, reduce + copy
    compute = {"F": sum(made["F"].values()), "I": sum(made["I"].values()) + sum(made["W"].values())}
    for kind, seconds in (("F", gather), ("I", gather + reduce)):
        hidden = min(seconds, compute[kind]) if group.size > 1 else 0.0  # for one rank nothing is fetched ahead
        made[kind]["zero"] = seconds - hidden + rates.fit.contention * hidden
