"""The account of memory beside an exact count, for Llama-3 8B and 70B at 8 thousand and 128 thousand tokens.

    python -m benchmarks.memory                 # account and count of every layout below, and the published anchors
    python -m benchmarks.memory --per-token     # bytes a token and layer of Llama-3 8B, by option (docs/memory.md)
    python -m benchmarks.memory --longest       # how long a sequence fits by the account, all options on

The count runs the real build and the real step of a rank on fake tensors under a fake process group, and follows every
storage: no GPU, no memory. It is exact for tensors; a GPU adds its context, workspaces of kernels and fragmentation.
The account must be within 3 % of it, which is asserted.
"""

import argparse
import warnings

import torch

from megasp import dry_run
from megasp.config.layout import Layout
from megasp.config.load import load, parser
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.planner.memory import FRAGMENTATION, OUTSIDE
from megasp.training.datasets import resolve
from megasp.training.memory import account

PARAMETERS = 8.03e9
LONG = "--seq-length 131072 --max-position-embeddings 131072"
FULL = "--recompute-granularity full"
HOST = f"--optimizer-cpu-offload {FULL}"
ZERO = "--data-parallel-sharding-strategy"
PP2 = "--pipeline-model-parallel-size 2 --global-batch-size 16"
CASES: list[tuple[str, int, str]] = [
    # model, ranks, flags
    ("llama3-8b", 8, ""),
    ("llama3-8b", 8, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ("llama3-8b", 8, "--tensor-model-parallel-size 4"),
    ("llama3-8b", 8, "--context-parallel-size 2"),
    ("llama3-8b", 8, "--recompute-granularity selective --recompute-modules mlp layernorm"),
    ("llama3-8b", 8, "--tiled-mlp 4 --tensor-model-parallel-size 2 --sequence-parallel"),
    ("llama3-8b", 8, "--fp8-format hybrid --tensor-model-parallel-size 2 --sequence-parallel"),
    ("llama3-8b", 8, "--fp8-format hybrid --fp8-recipe rowwise --first-last-layers-bf16 --ulysses-size 4"),
    ("llama3-8b", 8, "--pipeline-model-parallel-size 4 --global-batch-size 16"),
    ("llama3-8b", 8, f"--ulysses-size 8 {LONG}"),
    ("llama3-8b", 8, f"--ring-size 8 {LONG}"),
    ("llama3-8b", 8, f"--tensor-model-parallel-size 2 --sequence-parallel --ulysses-size 4 {FULL} {LONG}"),
    ("llama3-8b", 8, f"--ulysses-size 4 --ring-size 2 {FULL} --tiled-mlp 8 {LONG}"),
    ("llama3-8b", 8, f"--ring-size 8 --recompute-granularity all-but-attention {LONG}"),
    ("llama3-8b", 8, f"--ulysses-size 4 --ring-size 2 --ulysses-head-chunks 2 {LONG}"),
    ("llama3-8b", 8, f"--ulysses-size 2 --ring-size 4 --ulysses-head-chunks 2 {FULL} --tiled-mlp 16 {LONG}"),
    ("llama3-8b", 8, f"--ulysses-size 4 --sequence-chunks 8 {LONG}"),
    ("llama3-8b", 8, f"--ulysses-size 2 --sequence-chunks 16 --ulysses-head-chunks 2 {FULL} {LONG}"),
    ("llama3-8b", 8, f"--tensor-model-parallel-size 2 --sequence-parallel --sequence-chunks 8 --tiled-mlp 16 {LONG}"),
    ("llama3-8b", 8, f"--sequence-chunks 16 --cpu-offloading-attention --cpu-offloading-activations {FULL} {LONG}"),
    ("llama3-8b", 8, f"{ZERO} optim {FULL}"),
    ("llama3-8b", 8, f"{ZERO} optim --global-batch-size 16"),
    ("llama3-8b", 8, f"{ZERO} optim --grad-reduce-in-bf16 --context-parallel-size 2 --global-batch-size 8"),
    ("llama3-8b", 8, f"{ZERO} optim_grads {FULL} --global-batch-size 16"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params --recompute-granularity all-but-attention --global-batch-size 16"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params {FULL} --recompute-num-layers 4 --ulysses-size 8 {LONG}"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params --num-distributed-optimizer-instances 2"),
    ("llama3-8b", 8, f"{ZERO} optim --num-distributed-optimizer-instances 4 {PP2} --pipeline-schedule zb-h1"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params {PP2} --pipeline-schedule zbv --fp8-format hybrid"),
    ("llama3-8b", 8, f"{ZERO} optim_grads {PP2} --num-virtual-stages-per-pipeline-rank 4"),
    ("llama3-8b", 8, f"--cpu-offloading-activations {ZERO} optim_grads_params"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params {HOST} --cpu-offloading-weights --ulysses-size 8 {LONG}"),
    ("llama3-8b", 1, f"{ZERO} optim_grads_params {HOST} --cpu-offloading-weights --cpu-offloading-activations"),
    ("llama3-8b", 8, "--recompute-granularity full --recompute-method block --recompute-num-layers 16"),
    ("llama3-8b", 1, f"--optimizer-cpu-offload {FULL}"),
    ("llama3-8b", 8, f"{ZERO} optim_grads_params {HOST} --ulysses-size 8 {LONG}"),
    (
        "llama3-70b",
        64,
        "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --global-batch-size 16",
    ),
    (
        "llama3-70b",
        64,
        "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
        "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 16",
    ),
    (
        "llama3-70b",
        64,
        f"--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --ulysses-size 2 {FULL} "
        f"--global-batch-size 4 {LONG}",
    ),
    (
        "llama3-70b",
        64,
        f"--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 2 --ring-size 4 {FULL} "
        f"--recompute-num-layers 2 --global-batch-size 2 {LONG}",
    ),
    (
        "llama3-70b",
        1024,
        f"--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 4 {ZERO} optim "
        "--num-virtual-stages-per-pipeline-rank 20 --global-batch-size 512",
    ),
    ("llama3-70b", 64, f"{ZERO} optim_grads_params --tensor-model-parallel-size 8 --sequence-parallel {FULL}"),
]
SAID = (
    "recompute", "tiled", "num-virtual", "pipeline-schedule", "sequence-chunks", "ulysses-head", "cpu", "optimizer-cpu",
    "fp8", "first-last", "grad-reduce",
)  # fmt: skip
"""Beginnings of the flags that a table names beside the layout."""

OPTIONS = {
    "nothing": "",
    "selective: core_attn": "--recompute-granularity selective",
    "selective: layernorm": "--recompute-granularity selective --recompute-modules layernorm",
    "selective: layernorm, mlp_act": "--recompute-granularity selective --recompute-modules layernorm mlp_act",
    "selective: mlp": "--recompute-granularity selective --recompute-modules mlp",
    "selective: mlp, layernorm": "--recompute-granularity selective --recompute-modules mlp layernorm",
    "tiled MLP": "--tiled-mlp 8",
    "all-but-attention": "--recompute-granularity all-but-attention",
    "full": FULL,
    "sequence chunks": "--sequence-chunks 8",
    "sequence chunks, full": f"--sequence-chunks 8 {FULL}",
    "fp8": "--fp8-format hybrid",
    "fp8, selective: layernorm, mlp_act": "--fp8-format hybrid --recompute-granularity selective "
    "--recompute-modules layernorm mlp_act",
}
LONGEST = f"--cpu-offloading-attention --cpu-offloading-activations {FULL} --grad-reduce-in-bf16"
CHUNK = 16384
"""Tokens of a chunk."""


def configured(model: str, ranks: int, flags: str) -> tuple[Config, Layout]:
    argv = f"--model {model} --bf16 --mock-data --train-iters 1 --lr 1e-4 {flags}".split()
    config = resolve(load(argv, parser("memory", ""))[0])
    return config, validate(config, ranks, "cuda")


def compare() -> None:
    """Account and count of every case, on the first and the last pipeline rank."""
    worst = 0.0
    print("account and count in GB (10^9 bytes) of a rank at its fullest moment\n")
    print("| model, tokens | layout | flags | rank | states | account | count | difference | fullest in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, ranks, flags in CASES:
        config, layout = configured(model, ranks, flags)
        for place in sorted({0, layout.pp - 1}):
            expected = account(config, layout, place)
            counted = dry_run.count(config, layout, expected.rank, steps=1)
            difference = expected.total / counted.peak - 1
            worst = max(worst, abs(difference))
            options = [word for word in flags.split("--") if word.startswith(SAID)]
            said = " ".join("--" + word.strip() for word in options)
            print(
                f"| {model}, {config.training.seq_length} | {layout.name} | {said} | {place} "
                f"| {expected.static / 1e9:.2f} | {expected.total / 1e9:.2f} | {counted.peak / 1e9:.2f} "
                f"| {difference:+.2%} | {expected.fullest} |",
                flush=True,
            )
    print(f"\nlargest difference {worst:.2%}")
    assert worst < 0.03


def anchors() -> None:
    """Published numbers beside the account."""
    config, layout = configured("llama3-8b", 8, "--context-parallel-size 2 --global-batch-size 8")
    ours = account(config, layout, zero=1, gradient_item=2)
    static = ours.static + ours.states.gradients
    print("\npublished: Llama-3 8B, cp 2, dp 4, ZeRO-1, bf16 gradients, 8192 tokens, H100")
    print(f"    states at the start   44.27 GB    account {static / 1e9:6.2f} GB  {static / 44.27e9 - 1:+.1%}")
    print(f"    peak                  70.83 GB    account {ours.total / 1e9:6.2f} GB  {ours.total / 70.83e9 - 1:+.1%}")
    flags = (
        "--num-layers 32 --hidden-size 6144 --ffn-hidden-size 24576 --num-attention-heads 48 --num-query-groups 8 "
        "--squared-relu --vocab-size 256000 --normalization LayerNorm --seq-length 4096 --tensor-model-parallel-size 2"
    )
    argv = f"{flags} --group-query-attention --untie-embeddings-and-output-weights --disable-bias-linear --bf16".split()
    argv += ["--position-embedding-type", "rope", "--attention-dropout", "0", "--hidden-dropout", "0"]
    argv += ["--global-batch-size", "64"]
    config = resolve(load([*argv, "--mock-data", "--train-iters", "1", "--lr", "1e-4"], parser("memory", ""))[0])
    theirs = account(config, validate(config, 64, "cuda"), zero=1, gradient_item=2)
    static = theirs.static + theirs.states.gradients
    print("published: Nemotron-15B, tp 2, dp 32, ZeRO-1, bf16 gradients")
    print(f"    states at the start   34.47 GB    account {static / 1e9:6.2f} GB  {static / 34.47e9 - 1:+.1%}")


def per_token() -> None:
    """What a layer of Llama-3 8B keeps, and the most that one has at a time, in bytes a token."""
    print("| option | kept a token and layer | of 32 layers and 8192 tokens, GB |")
    print("| --- | --- | --- |")
    for name, flags in OPTIONS.items():
        config, layout = configured("llama3-8b", 1, flags)
        kept = sum(account(config, layout).layer.values())
        print(f"| {name} | {kept / 8192:,.0f} | {32 * kept / 1e9:.1f} |")


def longest() -> None:
    """The longest sequence of Llama-3 8B that fits, with its optimizer and master weights on the host: bf16 weights and
    gradients stay, on several GPUs sharded (ZeRO-3)."""
    print("| GPUs | layers that keep one input | longest sequence | on each device, GB | host, GB |")
    print("| --- | --- | --- | --- | --- |")
    for size, ranks, states in ((80e9, 1, 4), (141e9, 1, 4), (80e9, 8, 0.5), (141e9, 8, 0.5)):
        for group in (1, 2, 4):
            fits = _longest(size, ranks, states, group)
            if fits is not None:
                print(
                    f"| {ranks} x {size / 1e9:.0f} GB | {group} | {fits[0]:,} | {fits[1]:.1f} | {fits[2]:,.0f} |",
                    flush=True,
                )


def _longest(size: float, ranks: int, states: float, group: int) -> tuple[int, float, float] | None:
    """Tokens, and GB on a device and on the host, where `states` bytes a parameter stay on each of `ranks` devices."""

    def held(chunks: int) -> tuple[int, float, float] | None:
        tokens = chunks * CHUNK * ranks
        length = f"--seq-length {tokens} --max-position-embeddings {tokens} --sequence-chunks {chunks}"
        flags = f"{length} {LONGEST} --recompute-num-layers {group} --ulysses-size {ranks}"
        each = account(*configured("llama3-8b", ranks, flags), zero=3)
        device = each.total - each.static + states * PARAMETERS
        fits = device * (1 + FRAGMENTATION) + OUTSIDE <= size
        return (tokens, device / 1e9, (ranks * each.on_host + 12 * PARAMETERS) / 1e9) if fits else None

    low, high = 0, 512
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) else (low, middle)
    return held(low) if low else None


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--per-token", action="store_true")
    arguments.add_argument("--longest", action="store_true")
    if arguments.parse_args().per_token:
        per_token()
    elif arguments.parse_args().longest:
        longest()
    else:
        anchors()
        compare()
