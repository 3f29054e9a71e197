"""Long sequences on one CUDA device: chunks of the sequence, keys and values on the host, against none of it.

    python -m benchmarks.gpu.sequence_chunks [--layers 2] [--sequence 65536] [--chunks 8]

One step of an 8B-shaped model with few layers: time, peak memory beside the account, and loss and gradient norm, which
must agree to 1 %. Without a CUDA device it says so and ends.
"""

import argparse
import time

import torch

from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.parallel_state import ParallelState
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader, resolve
from megasp.training.memory import account
from megasp.training.step import accumulate_gradients, apply_gradients

CASES = (
    "--recompute-granularity full",
    "--sequence-chunks {chunks}",
    "--sequence-chunks {chunks} --cpu-offloading-attention",
    "--sequence-chunks {chunks} --cpu-offloading-attention --cpu-offloading-activations --recompute-granularity full",
)


def run(flags: str, args: argparse.Namespace) -> tuple[float, float]:
    """Two steps of one case; prints a line. Returns loss and gradient norm of the last."""
    common = (
        f"--model llama3-8b --bf16 --mock-data --train-iters 2 --lr 1e-5 --num-workers 0 --num-layers {args.layers}"
    )
    length = f"--seq-length {args.sequence} --max-position-embeddings {args.sequence}"
    argv = f"{common} {length} {flags.format(chunks=args.chunks)}".split()
    config = resolve(load(argv, parser("chunks", ""))[0])
    layout = validate(config, 1, "cuda")
    expected = account(config, layout)
    state = ParallelState.single(torch.device("cuda"))
    training = build(config, state)
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = accumulate_gradients(training, loader.step())[0]
            norm = apply_gradients(training, 0.0)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print(
        f"{flags.format(chunks=args.chunks)}: {seconds:.2f} s, {args.sequence / seconds:,.0f} tokens/s, peak "
        f"{peak / 1e9:.2f} GB, account {expected.total / 1e9:.2f} GB ({expected.total / peak - 1:+.1%}), "
        f"loss {loss:.4f}, gradient norm {norm:.4f}",
        flush=True,
    )
    return float(loss), norm


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--sequence", type=int, default=65536)
    arguments.add_argument("--chunks", type=int, default=8)
    args = arguments.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is run")
        return
    found = [run(flags, args) for flags in CASES]
    for loss, norm in found[1:]:
        assert abs(loss / found[0][0] - 1) < 0.01 and abs(norm / found[0][1] - 1) < 0.01, found


if __name__ == "__main__":
    main()
