"""One CUDA device: what --compile and each recompute gain and cost, the longest sequence that really trains, and one
rank of a 70B layout at its real size.

    python -m benchmarks.gpu.one_device options [--layers N] [--sequence 8192]   # Llama-3-8B shape, bf16
    python -m benchmarks.gpu.one_device longest [--layers 32]                    # doubling, then bisection
    python -m benchmarks.gpu.one_device rank [--layout tp8-pp4-dp2-zero1] [--rank 0]   # Llama-3-70B, 8192 tokens

All run the real build and the real step under PyTorch's fake process group: computation is real and collectives do
nothing, so with several ranks values mean nothing, and time is that of computation alone. Beside peak memory stand the
account and a dry run, beside time the planner's. Without a CUDA device it says so and ends. **Not run on one yet.**
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu.train_step import layers_that_fit
from megasp import dry_run, parallel_state
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.data_parallel import global_norm, sum_partial_, sum_tied_
from megasp.model.flops import flops_per_token, mfu, tflops_per_device
from megasp.planner.hardware import known, load
from megasp.planner.job import Job
from megasp.planner.layer_time import COMPONENTS
from megasp.planner.rates import Rates
from megasp.planner.step_time import step_time
from megasp.training.build import Training, build
from megasp.training.devices import peak_tflops
from megasp.training.memory import account
from megasp.verify import in_layout

LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope", "rotary_base": 500000, "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "group_query_attention": True,
    "num_query_groups": 8, "vocab_size": 128256, "attention_dropout": 0.0, "hidden_dropout": 0.0, "bf16": True,
    "mock_data": True, "train_iters": 1, "lr": 1e-4, "seq_length": 8192,
}  # fmt: skip
LLAMA_8B = LLAMA | {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32}
LLAMA_70B = LLAMA | {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "layernorm, mlp_act": {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "mlp_act")},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "all-but-attention": {"recompute_granularity": "all-but-attention"},
    "full": {"recompute_granularity": "full"},
}
LONG: dict[str, Any] = {
    "recompute_granularity": "full", "cpu_offloading_activations": True, "cpu_offloading_attention": True,
    "optimizer_cpu_offload": True, "grad_reduce_in_bf16": True, "compile": True,
}  # fmt: skip
"""The options of docs/memory.md for long sequences; chunks of `CHUNK` tokens."""
CHUNK = 16384


@dataclass(frozen=True)
class Measured:
    """Seconds of each step after the first ones, and the peak of allocated bytes (0 on a CPU)."""

    seconds: list[float]
    peak: int


def step(training: Training, batches: list[Any]) -> None:
    """All that a step does; nothing looks at values, of which a fake process group leaves none."""
    state = training.state
    training.pipeline.train(batches, 1.0)
    training.replicas.finish()
    sum_partial_(training.replicas.masters, state.tp)
    sum_tied_(training.tied, state.ends)
    global_norm(training.replicas.masters, state.model)
    training.optimizer.step()
    training.replicas.publish()


def measure(config: Config, layout: Layout, device: torch.device, rank: int = 0, steps: int = 5) -> Measured:
    """Some steps of one rank, after two that are not counted."""
    cuda = device.type == "cuda"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        training = build(config, parallel_state.build(layout, device))
        batches = [dry_run.microbatch(training) for _ in range(config.num_microbatches(layout))]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2 + steps):
            start = time.perf_counter()
            step(training, batches)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return Measured(seconds[2:], torch.cuda.max_memory_allocated() if cuda else 0)
    finally:
        dist.destroy_process_group()
        if cuda:
            torch.cuda.empty_cache()


def options(values: dict[str, Any], device: torch.device, steps: int = 5) -> Iterator[dict[str, Any]]:
    """A row for each recompute, with --compile and without."""
    peak = peak_tflops(device, torch.bfloat16)
    for name, given in RECOMPUTE.items():
        for compiled in (False, True):
            config = from_values(values | given | {"compile": compiled})
            layout = validate(config, 1, device.type)
            found = measure(config, layout, device, steps=steps)
            rate = config.training.seq_length / statistics.median(found.seconds)
            tflops = tflops_per_device(rate, flops_per_token(config.model, config.training.seq_length), 1)
            yield {
                "recompute": name, "compile": compiled, "tokens/s": round(rate), "TFLOP/s": round(tflops, 1),
                "MFU": mfu(tflops, peak), "peak GB": found.peak / 1e9,
                "account GB": account(config, layout, device=device.type).total / 1e9,
            }  # fmt: skip


def longest(fits: Callable[[int], bool], unit: int) -> int:
    """The most tokens, a multiple of `unit`, that fit: twice as many until they do not, then by halves; 0 for none."""
    low, high = 0, unit
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(unit, low // 32):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def trains(values: dict[str, Any], length: int, device: torch.device, chunk: int = CHUNK) -> bool:
    """Whether a step of one sample of so many tokens ends without running out of the device's memory."""
    config = from_values(values | {"seq_length": length, "sequence_chunks": max(1, length // chunk)})
    layout = validate(config, 1, device.type)
    try:
        found = measure(config, layout, device, steps=1)
    except torch.OutOfMemoryError:
        print(f"{length:>12,} tokens: out of memory", flush=True)
        return False
    expected = account(config, layout, device=device.type)
    print(
        f"{length:>12,} tokens: {found.seconds[0]:.1f} s a step, peak {found.peak / 1e9:.1f} GB, account "
        f"{expected.total / 1e9:.1f}, host {expected.on_host / 1e9:.0f}",
        flush=True,
    )
    return True


def one_rank(values: dict[str, Any], name: str, rank: int, device: torch.device, gpu: str) -> Iterator[dict[str, Any]]:
    """A row with --compile and one without, of a rank of a layout."""
    layout = Layout.parse(name)
    for compiled in (False, True):
        config = in_layout(from_values(values | {"compile": compiled}), layout)
        layout = validate(config, layout.world_size, "cuda")
        found = measure(config, layout, device, rank)
        pipeline_rank = rank // (layout.world_size // layout.pp)
        planned = step_time(Job.of(config, layout), Rates(load(gpu)))
        compute = {part: planned.parts.get(part, 0.0) for part in COMPONENTS[:5]} | {
            "optimizer": planned.parts.get("optimizer", 0.0)
        }
        yield {
            "layout": layout.name, "rank": rank, "compile": compiled, "seconds": statistics.median(found.seconds),
            "planner, mean of ranks": sum(compute.values()), "peak GB": found.peak / 1e9,
            "account GB": account(config, layout, pipeline_rank).total / 1e9,
            "dry run GB": dry_run.count(config, layout, rank).peak / 1e9,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("options", "longest", "rank"))
    parser.add_argument("--layers", type=int, help="of the 8B shape; as many as fit without it")
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--layout", default="tp8-pp4-dp2-zero1")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--gpu", default="h100-80", choices=known(), help="the planner's name of this device")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device here")
        return
    device = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(0)
    print(f"{facts.name}, torch {torch.__version__}", flush=True)
    if args.what == "options":
        layers = args.layers or layers_that_fit(args.sequence, facts.total_memory)
        rows = options(LLAMA_8B | {"num_layers": layers, "seq_length": args.sequence}, device)
    elif args.what == "rank":
        many = {"sequence_parallel": True, "seq_length": args.sequence, "global_batch_size": 8}
        rows = one_rank(LLAMA_70B | many, args.layout, args.rank, device, args.gpu)
    else:
        values = LLAMA_8B | LONG | {"num_layers": args.layers or 32}
        rows = iter([{"longest": longest(lambda length: trains(values, length, device), CHUNK)}])
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
