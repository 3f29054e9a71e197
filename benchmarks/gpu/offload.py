"""Offload to the host on one CUDA device: the same losses as without it, seconds, and peak memory beside the account.

    python -m benchmarks.gpu.offload [--layers 4] [--sequence 8192] [--steps 4]

A Llama-3-8B-shaped model of a few layers, bf16, two microbatches a step, trained on the same tokens with each kind of
offload. Losses must be those of the plain run: to the last bit where activations travel, to 1e-3 where AdamW runs on
another processor. Without a CUDA device it says so and ends.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist

from benchmarks.workload import llama
from megasp import parallel_state
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.planner.space import with_values
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.memory import account
from megasp.training.step import train_step

OPTIMIZER = {"optimizer_cpu_offload": True}
ZERO_3 = {"data_parallel_sharding_strategy": "optim_grads_params"}
CASES = {
    "plain": {},
    "recompute full": {"recompute_granularity": "full"},
    "activations": {"cpu_offloading_activations": True},
    "optimizer": OPTIMIZER,
    "half of the optimizer": OPTIMIZER | {"optimizer_offload_fraction": 0.5},
    "weights, gradients, optimizer": OPTIMIZER | ZERO_3 | {"cpu_offloading_weights": True},
    "all of it": OPTIMIZER
    | ZERO_3
    | {"cpu_offloading_weights": True, "cpu_offloading_activations": True, "recompute_granularity": "full"},
}
TOLERANCE = 1e-3


def run(config: Config, device: torch.device, steps: int) -> tuple[list[float], float, int, int]:
    """Losses, seconds of the fastest step but the first, and peak bytes: of the account, and allocated."""
    layout = validate(config, 1, "cuda")
    expected = account(config, layout).total
    torch.cuda.empty_cache()
    training = build(config, parallel_state.build(layout, device))
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
        for _ in range(steps):
            microbatches = loader.step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            losses.append(train_step(training, microbatches, 1e-4).loss)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return losses, min(seconds[1:]), expected, torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device here")
        return
    device = parallel_state.initialize_distributed()
    base = with_values(
        llama(
            layers=args.layers,
            hidden=4096,
            ffn=14336,
            heads=32,
            kv_heads=8,
            vocab=128256,
            sequence=args.sequence,
            batch=2,
        ),
        {"bf16": True, "mock_data": True, "train_iters": args.steps, "lr": 1e-4, "global_batch_size": 2},
    )
    print(f"## Offload on {torch.cuda.get_device_name()}, {args.layers} layers, s {args.sequence}, bf16\n")
    print("| on the host | s/step | peak GB | account GB | largest difference of losses |\n|---|---|---|---|---|")
    plain: list[float] = []
    lines = []
    for name, values in CASES.items():
        losses, seconds, expected, peak = run(with_values(base, values), device, args.steps)
        plain = plain or losses
        worst = max(abs(a - b) for a, b in zip(plain, losses, strict=True))
        print(f"| {name} | {seconds:.3f} | {peak / 1e9:.2f} | {expected / 1e9:.2f} | {worst:.1e} |", flush=True)
        lines.append({"on_host": name, "seconds": seconds, "peak": peak, "account": expected, "difference": worst})
        assert worst <= TOLERANCE, name
    print(json.dumps({"benchmark": "gpu/offload", "device": torch.cuda.get_device_name(), "runs": lines}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
