"""bf16 in every layout: do losses of layouts spread wider than those of seeds?

    python -m benchmarks.layouts_bf16 [--steps 300] [--picture docs/pictures/layouts_bf16.svg]

A small Llama on the source of Python's standard library, a byte a token, in bf16, on gloo ranks of this machine. All
runs read the same batches. Layouts start from the same weights: what makes them differ is where bf16 rounds. Seeds
start from other weights in one process. Writes a picture, and prints each run's last losses, the mean spread (largest
less smallest loss of a step) of layouts and of seeds, and one JSON line.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.converge import corpus
from benchmarks.workload import LEARNING_RATE, SEED, llama
from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.data import IndexedDatasetBuilder
from megasp.local_ranks import run_ranks
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader, resolve
from megasp.training.step import train_step
from megasp.verify import in_layout

LAYOUTS = ("tp1", "tp2", "pp2", "u2", "r2", "dp2-zero3")
SEEDS = 4
DOCUMENT = 4096
LAST = 50


def configured(folder: Path, steps: int) -> Config:
    """The run in one process; its corpus is written to `folder`."""
    with IndexedDatasetBuilder(folder / "text", np.uint16) as builder:
        for start in range(0, len(corpus()), DOCUMENT):
            builder.add_document(corpus()[start : start + DOCUMENT].astype(np.uint16))
    made = llama(layers=4, hidden=128, ffn=384, heads=4, kv_heads=2, vocab=256, sequence=128, batch=4)
    training = dataclasses.replace(made.training, global_batch_size=8, bf16=True, train_iters=steps, eval_iters=0)
    data = dataclasses.replace(made.data, mock_data=False, data_path=(str(folder / "text"),), split="1", num_workers=0)
    parallel = dataclasses.replace(made.parallel, sequence_parallel=True)
    return resolve(dataclasses.replace(made, training=training, data=data, parallel=parallel))


def losses(config: Config, layout: Layout, seed: int) -> list[float]:
    """Of every step on this rank; the seed is that of the weights alone."""
    state = parallel_state.build(layout, torch.device("cpu"))
    weights = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
    training = build(weights, state)
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        steps = config.training.train_iters or 0
        return [train_step(training, loader.step(), LEARNING_RATE).loss for _ in range(steps)]


def spread(curves: list[list[float]]) -> np.ndarray:
    """Largest less smallest loss of each step."""
    return np.ptp(np.array(curves), axis=0)


def draw(layouts: dict[str, list[float]], seeds: dict[str, list[float]], file: Path) -> None:
    """Losses over steps, and below them the two spreads."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "megasp"  # the same curves make the same file
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    for index, curve in enumerate(seeds.values()):
        upper.plot(curve, color="0.75", linewidth=3, label="seeds, one process" if index == 0 else None)
    for name, curve in layouts.items():
        upper.plot(curve, label=name, linewidth=0.8)
    upper.set_ylabel("loss, nats per byte")
    upper.set_title("A small Llama in bf16: layouts from the same weights, seeds from others")
    upper.legend(fontsize=8)
    lower.semilogy(spread(list(seeds.values())), color="0.6", label="seeds")
    lower.semilogy(np.maximum(spread(list(layouts.values())), 1e-5), color="C0", label="layouts")
    lower.set_ylabel("largest less\nsmallest loss")
    lower.set_xlabel("step")
    lower.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/layouts_bf16.svg"))
    args = parser.parse_args()
    layouts: dict[str, list[float]] = {}
    seeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = configured(Path(folder), args.steps)

        def run(name: str, seed: int) -> list[float]:
            there = in_layout(config, Layout.parse(name))
            layout = validate(there, Layout.parse(name).world_size)
            size = layout.world_size
            return run_ranks(losses, size, there, layout, seed, timeout=900, threads=2 // size)[0]

        for name in LAYOUTS:
            layouts[name] = run(name, SEED)
        for seed in range(SEED, SEED + SEEDS):
            seeds[f"seed {seed}"] = layouts["tp1"] if seed == SEED else run("tp1", seed)
    draw(layouts, seeds, args.picture)
    print(f"## bf16 over {args.steps} steps\n\n| run | mean of the last {LAST} losses |\n|---|---|")
    for name, curve in (layouts | seeds).items():
        print(f"| {name} | {np.mean(curve[-LAST:]):.4f} |")
    of_layouts, of_seeds = (float(spread(list(runs.values())).mean()) for runs in (layouts, seeds))
    print(f"\nmean spread of a step's losses: layouts {of_layouts:.4f}, seeds {of_seeds:.4f}")
    result = {"benchmark": "layouts_bf16", "steps": args.steps, "layouts": of_layouts, "seeds": of_seeds}
    print(json.dumps(result | {"versions": [f"torch {torch.__version__}"]}))
    assert of_layouts <= of_seeds, "layouts spread wider than seeds"


if __name__ == "__main__":
    main()
