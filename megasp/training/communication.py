"""`--log-comm`: what this rank sent over each axis in a step, beside the closed forms of the sequence axes."""

from collections.abc import Sequence

from megasp import log
from megasp.data import Batch
from megasp.parallel_state import Traffic
from megasp.sequence_parallel.traffic import AttentionShape, ring_traffic, ulysses_traffic
from megasp.training.build import Training


def expected(training: Training, microbatches: Sequence[Batch]) -> dict[str, Traffic]:
    """Axis -> what a training step on these microbatches sends over it, for the ulysses and the ring axis.

    Recomputing a layer repeats its forward; what the granularity says of each axis.
    """
    state, model = training.state, training.config.model
    recompute, parts = training.config.activations.recompute, training.config.activations.sequence_chunks
    repeats = recompute.attention_runs()
    heads, kv_heads = (max(1, count // state.tp.size) for count in (model.num_attention_heads, model.kv_heads))
    dtype = training.dtype
    stages = training.pipeline.stages.values()
    layers, attend = sum(len(stage.layers) for stage in stages), next(iter(stages)).attend
    chunks = attend.attention.chunks
    again = sum(len(group) for stage in stages for group, does in recompute.groups(len(stage.layers)) if does)
    totals = {axis: Traffic() for axis in repeats}
    for batch in microbatches:
        samples, tokens = batch.tokens.shape
        shape = AttentionShape(tokens // parts, samples, heads, kv_heads, model.head_dim, dtype)
        work = attend.work(tokens, heads, kv_heads, batch.document_starts)
        ulysses = state.ulysses
        of_layer = {
            "ulysses": ulysses_traffic(shape, ulysses.size, ulysses.rank, chunks),
        }
        if parts == 1:  # which are owners of keys as ranks of a ring are, but of one rank
            of_layer["ring"] = ring_traffic(shape, work, ulysses.size, ulysses.rank, state.ring.rank, chunks)
        for axis, (forward, backward) in of_layer.items():
            in_chunks = (parts > 1) * layers  # whose backward runs each forward again, but for attention
            totals[axis].add_all(forward, parts * (layers + (repeats[axis] - 1) * again + in_chunks))
            totals[axis].add_all(backward, parts * layers)
    return totals


def reset(training: Training) -> None:
    """Count from here."""
    for axis in training.state.axes.values():
        axis.traffic.reset()


def report(training: Training, microbatches: Sequence[Batch]) -> None:
    """Print what was sent since `reset`, which was one training step on `microbatches`."""
    formulas = expected(training, microbatches)
    log.info(f"sent in this step   {'axis':15} {'operation':15} {'calls':>6} {'bytes':>15} {'closed form':>15}")
    for name, axis in training.state.axes.items():
        formula, sent = formulas.get(name), axis.traffic
        for operation in sorted(sent.calls.keys() | (formula.calls.keys() if formula else set())):
            calls, size = sent.calls.get(operation, 0), sent.bytes_sent.get(operation, 0)
            told = "-"
            if formula is not None:
                wanted = formula.calls.get(operation, 0), formula.bytes_sent.get(operation, 0)
                told = f"{wanted[1]:,}" + (f" DIFFERS ({wanted[0]} calls)" if wanted != (calls, size) else "")
            log.info(f"{'':19} {name:15} {operation:15} {calls:6} {size:15,} {told:>15}")
