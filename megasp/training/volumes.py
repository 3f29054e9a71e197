"""What a rank sends and computes in a training step, in closed form: the table of docs/parallelism.md, added up.

`dry_run` counts the same in the real step; the two are printed side by side. What is left out is small: sums of norm
weights over `tp`, the numbers of losses and norms.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megasp.config.stages import Stage, split
from megasp.config.tiles import mlp_tiles
from megasp.data import Batch
from megasp.model.memory import end_parameters, layer_parameters
from megasp.pipeline.schedules import placement
from megasp.sequence_parallel.blocks import FULL
from megasp.training.build import Training
from megasp.training.communication import expected

Sent = Counter[tuple[str, str]]
"""(axis, operation) -> bytes that leave the rank."""


@dataclass(frozen=True)
class Volume:
    """A step of one rank.

    Attributes:
        sent: bytes by axis and operation.
        flops: floating-point operations of "matrix products" and "attention", a multiply and an add being two; causal
            attention is counted half. Recompute is counted.
    """

    sent: Sent = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)


def closed_forms(training: Training, microbatches: Sequence[Batch]) -> Volume:
    """Of a step on these microbatches."""
    volume = Volume()
    for axis, traffic in expected(training, microbatches).items():
        volume.sent.update({(axis, operation): size for operation, size in traffic.bytes_sent.items()})
    for stage in _mine(training):
        for batch in microbatches:
            _tensor(training, stage, volume.sent)
            _pipeline(training, stage, volume.sent)
            _compute(training, stage, batch, volume.flops)
    _gradients(training, len(microbatches), volume.sent)
    return Volume(+volume.sent, +volume.flops)


def _mine(training: Training) -> list[Stage]:
    plan, rank = training.config.pipeline, training.state.pp.rank
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    return [stage for stage in split(training.config) if owner[stage.number] == rank]


@dataclass(frozen=True)
class Again:
    """Layers of a stage of which something runs forward again in the backward.

    Attributes:
        attention, mlp: the products of that half; `core`: attention itself.
        reductions: halves' sums over `tp`: a recompute ends before the last, which no backward needs.
    """

    attention: int
    mlp: int
    core: int
    reductions: int

    @classmethod
    def of(cls, training: Training, stage: Stage) -> "Again":
        """Of a stage."""
        activations, layers = training.config.activations, len(stage.layers)
        recompute, tiled = activations.recompute, mlp_tiles(training.config, training.state.layout) > 1
        groups = [len(group) for group, again in recompute.groups(layers) if again]
        chosen = sum(groups)
        whole = chosen * (recompute.granularity in ("full", "all-but-attention"))
        if activations.sequence_chunks > 1:  # which keep attention's output, and run all else of a chunk again
            inner = layers * (mlp_tiles(training.config, training.state.layout) > activations.sequence_chunks)
            again = layers + whole
            return cls(again, again + inner, whole, 2 * again + inner)
        mlp = whole + chosen * recompute.does("mlp") + layers * tiled
        core = chosen * (recompute.granularity == "full" or recompute.does("core_attn"))
        last = layers + whole if tiled else max(0, whole - len(groups))
        return cls(whole, mlp, core, whole + last)


def _stream(training: Training) -> int:
    """Bytes of the residual stream of a microbatch, whole over `tp`."""
    config = training.config.training
    tokens = config.micro_batch_size * config.seq_length // training.state.cp.size
    return tokens * training.config.model.hidden_size * training.dtype.itemsize


def _tensor(training: Training, stage: Stage, sent: Sent) -> None:
    """A microbatch through a stage, over `tp`."""
    ranks = training.state.tp.size
    once = _stream(training) * (ranks - 1) // ranks
    layers, again = len(stage.layers), Again.of(training, stage)
    if training.config.parallel.sequence_parallel:
        sent["tp", "all_gather"] += once * (layers * 6 + again.attention + again.mlp + stage.first + stage.last)
        sent["tp", "reduce_scatter"] += once * (layers * 4 + again.reductions + stage.first + stage.last)
    else:
        sent["tp", "all_reduce"] += 2 * once * (layers * 4 + again.reductions + stage.first + stage.last)
        recompute = training.config.activations.recompute
        if recompute.distributed:  # inputs of what is recomputed, of which each rank keeps a share
            sent["tp", "all_gather"] += once * sum(redone for _, redone in recompute.groups(layers))
    if stage.last:  # largest logit, sum and target's logit of every token
        tokens = _stream(training) // (training.config.model.hidden_size * training.dtype.itemsize)
        sent["tp", "all_gather"] += 3 * max(4, training.dtype.itemsize) * tokens * (ranks - 1)


def _pipeline(training: Training, stage: Stage, sent: Sent) -> None:
    plan = training.config.pipeline
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    neighbours = [number for number in (stage.number - 1, stage.number + 1) if 0 <= number < len(owner)]
    messages = sum(owner[number] != owner[stage.number] for number in neighbours)
    split = training.state.tp.size if training.config.parallel.sequence_parallel else 1
    sent["pp", "send"] += messages * _stream(training) // split


def _gradients(training: Training, microbatches: int, sent: Sent) -> None:
    """Once a step: gradients' sums, and what sharding gathers."""
    config, axes, tp = training.config, training.state.axes, training.state.tp.size
    stages, zero = _mine(training), config.parallel.zero_stage
    layers = sum(len(stage.layers) for stage in stages) * layer_parameters(config.model, tp)
    beside = [end_parameters(config.model, tp, stage.first, stage.last) for stage in stages]
    ends = sum(sum(end.values()) for end in beside)
    norms = sum(end.get("final norm", 0) for end in beside)  # of the rest the backward needs no weights
    item, wide = training.dtype.itemsize, 2 if config.training.grad_reduce_in_bf16 else max(4, training.dtype.itemsize)
    shards, replicas = axes["dp_cp"].size, axes["dp_outer"].size
    if zero == 0 or shards == 1:
        ranks = axes["dp_outer_dp_cp"].size
        sent["dp_outer_dp_cp", "all_reduce"] += 2 * wide * (layers + ends) * (ranks - 1) // ranks
        return
    gathered = (2 * layers + ends + norms) * microbatches if zero == 3 else layers + ends
    reduced = (layers + ends) * (1 if zero == 1 or config.pipeline.defers_weight_gradients else microbatches)
    sent["dp_cp", "all_gather"] += item * gathered * (shards - 1) // shards
    sent["dp_cp", "reduce_scatter"] += wide * reduced * (shards - 1) // shards
    sent["dp_outer", "all_reduce"] += 2 * wide * (layers + ends) // shards * (replicas - 1) // replicas


def _pairs(training: Training, batch: Batch) -> float:
    """(query, key) pairs of a microbatch that this rank's ring rank computes; of a block with a causal mask half."""
    state, model = training.state, training.config.model
    attend = next(iter(training.pipeline.stages.values())).attend
    heads, kv_heads = (max(1, count // state.tp.size) for count in (model.num_attention_heads, model.kv_heads))
    samples, tokens = batch.tokens.shape
    work = attend.work(tokens, heads, kv_heads, batch.document_starts)
    if attend.sequence_chunks > 1:  # all of which are this rank's
        owners = [(q, k) for q in range(attend.sequence_chunks) for k in range(q + 1)]
    else:
        owners = list({(task.q, task.k): None for task in work.tasks(state.ring.rank)})
    blocks = [block for q, k in owners for block in work.blocks(q, k)]
    sizes = ((b.q[1] - b.q[0]) * (b.k[1] - b.k[0]) / (1 if b.kind == FULL else 2) for b in blocks)
    return sum(size * (samples if b.row is None else 1) for b, size in zip(blocks, sizes, strict=True))


def _compute(training: Training, stage: Stage, batch: Batch, flops: Counter[str]) -> None:
    """A microbatch through a stage."""
    model, config, tp = training.config.model, training.config.training, training.state.tp.size
    tokens = config.micro_batch_size * config.seq_length // training.state.cp.size
    queries = model.num_attention_heads // tp * model.head_dim
    kv = max(1, model.kv_heads // tp) * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * kv)
    mlp = model.hidden_size * model.mlp_size // tp * (3 if model.swiglu else 2)
    layers, again = len(stage.layers), Again.of(training, stage)
    weights = (3 * layers + again.attention) * attention + (3 * layers + again.mlp) * mlp
    weights += 3 * stage.last * model.padded_vocab_size // tp * model.hidden_size
    flops["matrix products"] += 2 * tokens * weights
    passes = 3.5 * layers + again.core  # the fused backward makes the scores again: five products for the forward's two
    flops["attention"] += int(passes * 4 * queries * _pairs(training, batch) / training.state.ulysses.size)
