"""Does it learn the same? 300 steps of a small Llama: megasp beside transformers, same weights, tokens and optimizer.

    python -m benchmarks.converge [--steps 300] [--picture docs/pictures/converge.svg]

The text is the source of Python's standard library, one byte a token. Curves: transformers in fp32; megasp in fp32,
which must stay within 0.02 of it; megasp in bf16; and transformers in bf16 (autocast), whose distance from itself is
what bf16 does. Writes a picture, and prints the largest differences and one JSON line.
"""

import argparse
import json
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.contest import Contestant, Outcome, play
from benchmarks.trainers import make_megasp, make_transformers, version
from benchmarks.workload import LEARNING_RATE, SEED, llama
from megasp.config.schema import Config
from megasp.data import Batch

SMALL = llama(layers=4, hidden=128, ffn=384, heads=4, kv_heads=2, vocab=256, sequence=256, batch=8)
TOLERANCE = 0.02
CORPUS_BYTES = 4 * 2**20


@cache
def corpus() -> np.ndarray:
    """The first 4 MiB of the standard library's modules, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return np.frombuffer(bytes(text[:CORPUS_BYTES]), np.uint8)


def text_batch(config: Config, step: int) -> Batch:
    """Pieces of the corpus at random places, the same for everyone."""
    rows, length, text = config.training.micro_batch_size, config.training.seq_length, corpus()
    starts = np.random.RandomState(SEED + step).randint(0, len(text) - length - 1, rows)
    ids = np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64)
    mask = np.ones((rows, length), np.float32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), mask, np.arange(length), np.arange(rows) + step * rows)


def draw(curves: dict[str, list[float]], distances: dict[str, float], file: Path) -> None:
    """Losses over steps, and below them each curve's distance from the reference."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "megasp"  # the same curves make the same file
    from matplotlib import pyplot

    reference, *others = curves
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    for index, (name, losses) in enumerate(curves.items()):
        upper.plot(losses, label=name, linewidth=3 - 0.7 * index, alpha=0.8)
    upper.set_ylabel("loss, nats per byte")
    upper.set_title("A small Llama on Python's standard library, same weights and batches")
    upper.legend()
    for index, name in enumerate(others, 1):
        away = [abs(a - b) for a, b in zip(curves[name], curves[reference], strict=True)]
        lower.semilogy(np.maximum(away, 1e-8), color=f"C{index}", label=f"{name}: at most {distances[name]:.1e}")
    lower.set_ylabel(f"distance from\n{reference}")
    lower.set_xlabel("step")
    lower.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/converge.svg"))
    args = parser.parse_args()
    contestants = [
        Contestant("transformers, fp32", make_transformers, (SMALL, "fp32", LEARNING_RATE, text_batch), threads=2),
        Contestant("megasp, fp32", make_megasp, (SMALL, "fp32", LEARNING_RATE, text_batch), threads=2),
        Contestant("megasp, bf16", make_megasp, (SMALL, "bf16", LEARNING_RATE, text_batch), threads=2),
        Contestant("transformers, bf16", make_transformers, (SMALL, "bf16", LEARNING_RATE, text_batch), threads=2),
    ]
    outcomes: list[Outcome] = play(contestants, args.steps, warmup=0)
    curves: dict[str, list[float]] = {outcome.contestant.name: outcome.results for outcome in outcomes}
    reference = curves["transformers, fp32"]
    distances = {
        name: max(abs(a - b) for a, b in zip(losses, reference, strict=True)) for name, losses in curves.items()
    }
    draw(curves, distances, args.picture)
    print(f"## Convergence, {args.steps} steps\n\n| run | first loss | last loss | largest difference |")
    print("|---|---|---|---|")
    for name, losses in curves.items():
        print(f"| {name} | {losses[0]:.4f} | {losses[-1]:.4f} | {distances[name]:.1e} |")
    versions = [f"torch {torch.__version__}", version("transformers")]
    print(json.dumps({"benchmark": "converge", "steps": args.steps, "versions": versions, "differences": distances}))
    assert distances["megasp, fp32"] <= TOLERANCE, f"megasp's losses are not transformers': {distances}"


if __name__ == "__main__":
    main()
