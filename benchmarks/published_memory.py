"""Published peak memory beside what the stack's code holds by `stack_memory.py`.

A row is compared where the source says what a GPU holds: `left_out` has the rules. A peak below what the row's own
layout needs at least (`MemoryRow.least`) contradicts itself and is not compared either.
"""

from dataclasses import dataclass
from functools import cached_property

from benchmarks.published import Row, rows
from benchmarks.stack_memory import OPTIMIZER, STACKS, Piece, Stack, fullest, kept_bytes, widths
from megasp.config.recompute import Recompute
from megasp.config.stages import Stage as Part
from megasp.footprint import Footprint
from megasp.model.memory import Sizes, layer_footprint, layer_parameters
from megasp.pipeline.schedules import placement, schedule
from megasp.planner.job import Job
from megasp.planner.memory import FRAGMENTATION, ROUNDS
from megasp.sequence_parallel.memory import AttentionSizes

PRINTED = {"NANOTRON": (2**30, True)}
"""Unit, and whether the allocator's reservation is meant, where the source's code says more than the source: nanotron's
`log_throughput` (src/nanotron/helpers.py) divides by 1024^3. It prints allocated and reserved memory; that its picture
shows the second is our reading."""


def left_out(row: Row) -> str | None:
    """Why a row that states its peak memory is not compared, or None."""
    if row["framework"].endswith("(ZB-2p)"):
        return "schedule ZB-2p, which megasp has not"
    if row["notes"].startswith("SFT"):
        return "fine-tuning: how many tokens a microbatch has is not in the source"
    if row["offload"]:
        return "what is on the host, and when, is not in the source"
    if not row["zero_stage"]:
        return "where its optimizer states are is not in the source"
    if MemoryRow(row).least > measured(row):
        return "contradicts itself: states and inputs of its operations are more than is printed"
    return None


def compared() -> list["MemoryRow"]:
    """Every row that counts."""
    return [MemoryRow(row) for row in rows() if row["peak_mem_GB"] and left_out(row) is None]


def reasons() -> list[str]:
    """Of every row that states a peak and is not compared."""
    return [reason for row in rows() if row["peak_mem_GB"] and (reason := left_out(row))]


def measured(row: Row) -> float:
    """The published peak in bytes."""
    unit, _ = PRINTED.get(row["source"], (2**30 if "GiB" in row["mem_kind"] else 1e9, False))
    return float(row["peak_mem_GB"]) * unit


def measures_reserved(row: Row) -> bool:
    """Whether what is measured is what PyTorch's allocator has taken, of which tensors use a part."""
    return PRINTED.get(row["source"], (0, "reserved" in row["mem_kind"]))[1]


@dataclass(frozen=True)
class MemoryRow:
    """One measured peak and the predicted one, in bytes."""

    row: Row

    @property
    def measured(self) -> float:
        return measured(self.row)

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @cached_property
    def job(self) -> Job:
        return self.row.job

    @property
    def stack(self) -> Stack:
        """Its code base, in its version."""
        name = self.row["framework"].split(" (")[0]
        if name == "torchtitan" and self.row.number("tp") > 1:
            name += ", loss parallel"
        elif name == "torchtitan" and "_2025" in self.row["notes"]:
            name += ", compiled loss"
        return STACKS[name]

    @property
    def least(self) -> float:
        """Bytes that no implementation of this row's layout does without: weights and optimizer states as in the ZeRO
        paper (arXiv 1910.02054), without gradients, and where nothing is recomputed the inputs of one microbatch's
        operations in two bytes: norms, products, attention, activation (megasp's account of a layer), and the loss.
        """
        row, job = self.row, self.job
        shards = job.layout.dp_inner * job.layout.cp
        ends = self._table * (1 + job.model.untie_embeddings_and_output_weights)
        elements = (self._elements * job.model.num_layers + ends) / job.layout.pp
        states = elements * (2 / (shards if job.zero == 3 else 1) + OPTIMIZER / (shards if job.zero else 1))
        if row["recompute"] != "none" or job.precision == "fp8":
            return states
        kept = self._lean.total * job.model.num_layers / job.layout.pp
        return states + kept + 2 * self._logits / job.layout.pp

    @cached_property
    def predicted(self) -> float:
        """The fullest pipeline rank, and where that was measured what the allocator has taken for it."""
        allocated = max(self._rank(rank) for rank in range(self.job.plan.ranks))
        return allocated * (1 + FRAGMENTATION * measures_reserved(self.row))

    def _rank(self, rank: int) -> float:
        job, stack, plan = self.job, self.stack, self.job.plan
        owner = placement(plan.schedule, plan.ranks, plan.chunks)
        stages = {stage.number: self._pieces(stage) for stage in job.stages if owner[stage.number] == rank}
        few = min(job.microbatches, ROUNDS * plan.ranks)
        actions = schedule(plan.schedule, plan.ranks, few, plan.chunks).rows[rank]
        elements = sum(piece.elements for pieces in stages.values() for piece in pieces)
        shards = job.layout.dp_inner * job.layout.cp
        replicas = shards * job.layout.dp_outer
        queued = min(stack.queued, max(len(stage.layers) for stage in job.stages if owner[stage.number] == rank))
        whole = (stack.gathered + 2 * queued) * 2 * job.tokens * job.model.hidden_size if job.layout.tp > 1 else 0
        states = stack.states(elements, self._elements, self._table, shards, replicas, job.zero)
        return states + fullest(actions, stages, stack.made) + whole

    @property
    def _table(self) -> float:
        """Elements of the embedding, or of the head, on this rank."""
        return self.job.model.padded_vocab_size * self.job.model.hidden_size / self.job.layout.tp

    def _pieces(self, stage: Part) -> list[Piece]:
        """What runs one after another in a stage."""
        job, pieces = self.job, [self._layer] * len(stage.layers)
        stream = 2 * job.tokens * self._widths["stream"]
        tied = not job.model.untie_embeddings_and_output_weights and stage.first and stage.last
        if stage.first:
            pieces.insert(0, Piece(0.0, 0.0, self._table))
        if stage.last:
            pieces.append(Piece(2 * stream, self.stack.logits * self._logits, 0.0 if tied else self._table))
        elif self.stack.keeps_output:
            pieces.append(Piece(stream, 0.0, 0.0))
        return pieces

    @cached_property
    def _widths(self) -> dict[str, float]:
        job = self.job
        return widths(job.model, job.layout.tp, job.layout.tp if job.sequence_parallel else 1, job.seq_length)

    @property
    def _logits(self) -> float:
        """How many a microbatch has on this rank."""
        return self.job.tokens * self.job.model.padded_vocab_size / self.job.layout.tp

    @cached_property
    def _layer(self) -> Piece:
        """A layer; where it is recomputed it exists whole in its backward."""
        job, words, lean = self.job, self.row["recompute"], self._lean
        scores = self.stack.working * self._widths["scores"] * job.tokens
        working = lean.backward - lean.total * (words == "none") + scores
        return Piece(job.tokens * kept_bytes(self.stack.layers[words], self._widths), working, self._elements)

    @property
    def _elements(self) -> int:
        return layer_parameters(self.job.model, self.job.layout.tp)

    @property
    def _lean(self) -> Footprint:
        """megasp's account of a layer, with flash attention."""
        job, model, tp = self.job, self.job.model, self.job.layout.tp
        heads, keys = (max(1, count // tp) for count in (model.num_attention_heads, model.kv_heads))
        tokens = round(job.tokens)
        attention = AttentionSizes(tokens, heads, keys, model.head_dim, 2, job.micro_batch)
        sizes = Sizes(tokens, job.micro_batch, 2, 2, 2, tp, job.sequence_parallel, attention)
        return layer_footprint(model, sizes, Recompute())
