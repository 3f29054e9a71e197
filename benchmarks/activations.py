"""Activations of a rank over the number of ranks that split a sequence, by exact counts of allocations; a picture.

    python -m benchmarks.activations [--picture docs/pictures/activations.svg]

Two layers of Llama 3 8B in bf16, sequences of 262,144 and 1,048,576 tokens, P = 1 to 64 ranks, every mode. The real
model runs forward and backward on fake tensors under a fake process group: nothing is computed, and every storage that
would be allocated is followed. Two numbers each: what the forward keeps for the backward, and the peak of both beyond
weights and their gradients. Kernels' own workspaces and the allocator's rounding are not in them.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasp import parallel_state
from megasp.config.flags import build
from megasp.config.layout import Layout
from megasp.config.presets import PRESETS
from megasp.config.schema import ModelConfig
from megasp.dry_run import fake_tensors
from megasp.model import Factory, GPTModel
from megasp.sequence_parallel import SequenceAttention
from megasp.sequence_parallel.shards import shards

LAYERS = 2
LENGTHS = 2**18, 2**20
RANKS = 1, 2, 4, 8, 16, 32, 64
MODES = {
    "ring": lambda ranks: (1, ranks, "p2p"),
    "LightSeq": lambda ranks: (1, ranks, "lightseq"),
    "all-gather": lambda ranks: (1, ranks, "all_gather"),
    "Ulysses, to 32 heads": lambda ranks: (ranks, 1, "p2p") if ranks <= 32 else None,
    "Ulysses to 8, then x ring": lambda ranks: (min(8, ranks), max(1, ranks // 8), "p2p"),
}
"""Name -> (Ulysses, ring, how the ring exchanges) of so many ranks; None where there is none."""


def count(ulysses: int, ring: int, comm: str, length: int) -> tuple[int, int]:
    """(bytes kept after the forward, peak bytes beyond weights and gradients) of rank 0."""
    layout = Layout(ulysses=ulysses, ring=ring)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        state = parallel_state.build(layout, torch.device("cpu"))
        config = build(ModelConfig, PRESETS["llama3-8b"] | {"num_layers": LAYERS, "vocab_size": 1})
        attend = SequenceAttention(state, shards(length, ring, ulysses, comm), "flash", comm)
        tokens = length // layout.world_size
        with fake_tensors() as tracker:
            options = {"layers": range(LAYERS), "first": False, "last": False, "attend": attend}
            model = GPTModel(config, state, factory=Factory(dtype=torch.bfloat16), **options)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            before, tracker.peak = tracker.live, 0
            x = torch.empty(tokens, 1, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            out = model(x, positions=torch.zeros(tokens, dtype=torch.int64))
            kept = tracker.live - before
            out.backward(torch.empty_like(out))
            return kept, tracker.peak - before
    finally:
        dist.destroy_process_group()


def draw(found: dict[int, dict[str, dict[int, tuple[int, int]]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "megasp"  # the same counts make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 4.5), sharey=True)
    for panel, (length, modes) in zip(axes, found.items(), strict=True):
        for number, (mode, by_ranks) in enumerate(modes.items()):
            kept, peak = ([by_ranks[ranks][which] / 2**30 for ranks in by_ranks] for which in (0, 1))
            panel.plot(list(by_ranks), peak, "o-", color=f"C{number}", label=mode, markersize=4)
            if number == 0:
                panel.plot(list(by_ranks), kept, "k.", label=f"{mode}: kept for the backward")
                for whole, label in ((kept[0], "1 / P"), (peak[0], None)):
                    panel.plot(list(by_ranks), [whole / ranks for ranks in by_ranks], "k:", linewidth=1, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_title(f"{length:,} tokens")
        panel.set_xlabel("ranks P")
        panel.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("GiB of activations on a rank")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{LAYERS} layers of Llama 3 8B, bf16: peak of forward and backward")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/activations.svg"))
    found: dict[int, dict[str, dict[int, tuple[int, int]]]] = {}
    arguments = parser.parse_args()
    for length in LENGTHS:
        print(f"{length:,} tokens: GiB kept for the backward, peak")
        print(f"{'':26}" + "".join(f"{f'P = {ranks}':>16}" for ranks in RANKS))
        found[length] = {}
        for mode, sizes in MODES.items():
            by_ranks = {ranks: count(*split, length) for ranks in RANKS if (split := sizes(ranks)) is not None}
            found[length][mode] = by_ranks
            cells = (f"{kept / 2**30:8.3f},{peak / 2**30:7.3f}" for kept, peak in by_ranks.values())
            print(f"{mode:26}" + "".join(cells), flush=True)
    draw(found, arguments.picture)
    print(f"written: {arguments.picture}")


if __name__ == "__main__":
    main()
