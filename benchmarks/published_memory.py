"""Published peak memory beside the account of `training/memory.py`, with what other stacks hold beside it.

A row is compared where megasp has its schedule and its recompute, activations are bf16, and attention writes no scores;
`left_out` says which of these a row lacks. The account is megasp's own: lean Functions, logits in chunks. What a stack
is known to hold in their place is said in `LOGITS`; the rest of the difference is reported as it is.
"""

import dataclasses
from dataclasses import dataclass

from benchmarks.published import Row, rows
from megasp.config.load import from_values
from megasp.config.schema import SHARDING_STRATEGIES
from megasp.config.validate import validate
from megasp.errors import UserError
from megasp.planner.memory import FRAGMENTATION, OUTSIDE, shortened
from megasp.training.memory import Account, account

RECOMPUTE = {"none": None, "full": "full"}

LOGITS = {"NeMo/Megatron-Core": 6, "nanotron": 10}
"""Bytes of each logit at the loss: Megatron's fused cross entropy works in fp32 beside the bf16 logits; nanotron casts
them to fp32 and has their gradient beside."""

UNFUSED_LOGITS = 10
"""The same of stacks on Hugging Face's model code."""


@dataclass(frozen=True)
class MemoryRow:
    """One measured peak and the predicted one, in bytes."""

    row: Row
    layout: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def left_out(row: Row) -> str | None:
    """Why a row that states its peak memory is not compared, or None."""
    if row["precision"].startswith("FP8"):
        return "fp8, whose copies of weights and inputs depend on the recipe"
    if row["framework"].endswith("(ZB-2p)"):
        return "schedule ZB-2p, which megasp has not"
    if row["source"] == "ZB":
        return "attention scores are kept in memory, as its peaks show, which megasp never does"
    if not row["global_batch"]:
        return "global batch is not in the source"
    if row["recompute"] not in RECOMPUTE:
        return f"recompute {row['recompute']}, which megasp has not"
    if row["offload"]:
        return "what is on the host, and when, is not in the source"
    if row["source"] == "FPDT" and not row["zero_stage"]:
        return "where its optimizer states are is not in the source"
    return None


def compared() -> list[MemoryRow]:
    """Every row that counts."""
    return [_beside(row) for row in rows() if row["peak_mem_GB"] and left_out(row) is None]


def reasons() -> list[str]:
    """Of every row that states a peak and is not compared."""
    return [reason for row in rows() if row["peak_mem_GB"] and (reason := left_out(row))]


def _beside(row: Row) -> MemoryRow:
    zero, chunks = row.number("zero_stage", 0), row.number("vpp")
    values = dataclasses.asdict(row.model) | {
        "attention_dropout": 0.0,
        "max_position_embeddings": row.number("seq_len"),
        "seq_length": row.number("seq_len"),
        "micro_batch_size": row.number("micro_batch"),
        "global_batch_size": row.number("global_batch"),
        "tensor_model_parallel_size": row.number("tp"),
        "pipeline_model_parallel_size": row.number("pp"),
        "num_virtual_stages_per_pipeline_rank": chunks if row.number("pp") > 1 and chunks > 1 else None,
        "sequence_parallel": row["megatron_sp"] == "1",
        "ulysses_size": row.number("ulysses"),
        "ring_size": row.number("cp"),
        "data_parallel_sharding_strategy": SHARDING_STRATEGIES[zero],
        "recompute_granularity": RECOMPUTE[row["recompute"]],
        "bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0,
    }  # fmt: skip
    config = from_values(values)
    try:
        layout = validate(config, row.number("gpus"), "cuda")
    except UserError as error:
        raise AssertionError(f"{row['id']}: {error}") from None
    short = shortened(config, layout)
    peaks = [_with_logits(account(short, layout, rank), row, rank == layout.pp - 1) for rank in range(layout.pp)]
    unit = 2**30 if "GiB" in row["mem_kind"] else 1e9
    reserved = max(peaks) if "allocated" in row["mem_kind"] else max(peaks) * (1 + FRAGMENTATION) + OUTSIDE
    return MemoryRow(row, layout.name, float(row["peak_mem_GB"]) * unit, reserved)


def _with_logits(each: Account, row: Row, last: bool) -> float:
    vocabulary = row.model.padded_vocab_size // row.number("tp")
    return each.total + last * each.tokens * vocabulary * LOGITS.get(row["framework"], UNFUSED_LOGITS)
