"""Training step of a 56M Llama on a CPU: megasp beside transformers and megatron-core.

    python -m benchmarks.train_step [--dtype fp32|bf16]      # one process, 2 threads
    python -m benchmarks.train_step --compile                # megasp alone, with --compile and without
    python -m benchmarks.train_step --tp 2                   # tensor parallel 2, sequence parallel, 1 thread a rank

All train from the same weights on the same batches in turns (see contest.py), each by its own real path. Losses of
every step must agree to 1e-4 in fp32 before any speed is printed; in bf16 to 2e-2, as the frameworks round at other
places. Printed: a table (times as median (min-max)), and one JSON line.
"""

import argparse
import json
import platform
from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.contest import Contestant, play, record, table
from benchmarks.trainers import make_megasp, make_megatron, make_transformers, version
from benchmarks.workload import LLAMA_56M

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
TOKENS = LLAMA_56M.training.seq_length * LLAMA_56M.training.micro_batch_size


def contestants(dtype: str, tp: int, compiled: bool = False) -> list[Contestant]:
    """megasp first; whoever can run in that layout, or megasp once more, compiled."""
    threads = max(1, 2 // tp)
    if compiled:
        return [
            Contestant(
                "megasp" + " --compile" * each, partial(make_megasp, compile=each), (LLAMA_56M, dtype), tp, threads
            )
            for each in (False, True)
        ]
    found = [
        Contestant("megasp", make_megasp, (LLAMA_56M, dtype), tp, threads),
        Contestant("megatron-core + SDPA", make_megatron, (LLAMA_56M, dtype, True), tp, threads),
    ]
    if tp == 1:
        found.insert(1, Contestant("transformers", make_transformers, (LLAMA_56M, dtype), tp, threads))
        found.append(Contestant("megatron-core", make_megatron, (LLAMA_56M, dtype, False), tp, threads))
    return found


def same_loss(losses: Mapping[str, float], tolerance: float, reference: str = "megasp") -> None:
    """Raise where a contestant's loss of a step is another than the reference's."""
    for name, loss in losses.items():
        assert abs(loss - losses[reference]) <= tolerance, f"losses differ by more than {tolerance}: {losses} ({name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="fp32")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--compile", action="store_true", help="megasp with --compile and without, no peers")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    outcomes = play(
        contestants(args.dtype, args.tp, args.compile),
        args.rounds,
        args.warmup,
        check=lambda losses: same_loss(losses, TOLERANCES[args.dtype]),
    )
    ours = outcomes[0].results
    difference = {
        outcome.contestant.name: max(abs(a - b) for a, b in zip(outcome.results, ours, strict=True))
        for outcome in outcomes[1:]
    }
    print(f"## Training step, Llama 56M, {TOKENS} tokens, {args.dtype}, {args.tp} rank(s)\n")
    print(table(outcomes, ("tokens", TOKENS)))
    print("\nlargest difference of a loss from megasp's:", ", ".join(f"{k} {v:.1e}" for k, v in difference.items()))
    versions = [f"torch {torch.__version__}", version("transformers"), version("megatron-core")]
    result = {
        "benchmark": "train_step",
        "dtype": args.dtype,
        "tp": args.tp,
        "rounds": args.rounds,
        "tokens": TOKENS,
        "versions": versions,
        "machine": platform.machine(),
        "loss_difference": difference,
        "losses": [round(loss, 5) for loss in ours],
        "contestants": record(outcomes),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
