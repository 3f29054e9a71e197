"""Measure what this machine does, for `megasp plan --gpu FILE.yaml`.

Matrix products, attention by length, copies in memory and to the host; all-reduces by size where torchrun starts it on
the GPUs of a node. What is not measured is the --base part's, and so is what needs several nodes, the network.

    megasp calibrate --output my_gpu.yaml
    torchrun --standalone --nproc-per-node 8 -m megasp.cli calibrate --output my_node.yaml
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.config.kernels import ATTENTION_KERNELS
from megasp.planner import hardware
from megasp.process_group import initialize_distributed
from megasp.sequence_parallel import block_kernels
from megasp.sequence_parallel.blocks import CAUSAL, Block
from megasp.sequence_parallel.kernels import KERNELS

REPEATS = 5
HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """Calibrate."""

    output: str = flag(REQUIRED, "file to write", metavar="FILE.yaml")
    base: str = flag("h100-80", f"known part for what is not measured: {', '.join(hardware.known())}")


def run(options: Options) -> int:
    """Run the command."""
    hardware.load(options.base)  # refused before anything is measured
    device = initialize_distributed()
    measured = measure(device, options.base)
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        lines = f"# Measured by `megasp calibrate` on {where}; what is not here is {options.base}'s.\n"
        Path(options.output).write_text(lines + yaml.safe_dump(measured, sort_keys=False))
        log.info(f"{where}: {measured['matmul_TFLOPS']['bf16']:.4g} TFLOP/s in bf16 products, in {options.output}")
    dist.destroy_process_group()
    return 0


def measure(device: torch.device, base: str) -> dict[str, Any]:
    """The entries of a hardware file that can be measured here."""
    fast = device.type == "cuda"
    found: dict[str, Any] = {
        "base": base,
        "name": "calibrated",
        "hbm_TBps": _copy(device, 1 << (30 if fast else 24)) / 1e12,
        "matmul_TFLOPS": {"bf16": max(_matmul(device, n) for n in ((4096, 8192) if fast else (256, 512))) / 1e12},
        "attention_TFLOPS": _kernels(device, (512, 2048, 8192) if fast else (128, 256)),
    }
    if fast:
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_GB": properties.total_memory / 1e9, "sms": properties.multi_processor_count}
        found["compute_capability"] = [properties.major, properties.minor]
    if dist.get_world_size() > 1:
        sizes = [2**power for power in (range(20, 31, 2) if fast else (16, 20))]
        rates = [_all_reduce(device, size) / 1e9 for size in sizes]
        found["node"] = {
            "gpus": dist.get_world_size(),
            "collectives": {"MB": [size / 1e6 for size in sizes], "GBps": rates},
            "gather_GBps": rates[-1],
        }
    return found


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one call: the median of a few, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return sorted(times[1:])[REPEATS // 2]


def _matmul(device: torch.device, n: int) -> float:
    """FLOP/s of square bf16 products, of random numbers: zeros would run at higher clocks."""
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(device, lambda: left @ right)


def _copy(device: torch.device, size: int) -> float:
    """Bytes read and written a second."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(device, lambda: target.copy_(source))


def _kernels(device: torch.device, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Rates of every attention kernel that runs here, by the names of --attention-backend."""
    found = {}
    for (name, kind), kernel in KERNELS.items():
        if kind != device.type or name == "unfused" or not ATTENTION_KERNELS[name].installed:
            continue
        try:
            found[name] = _attention(device, kernel, lengths)
        except RuntimeError as error:
            log.info(f"--attention-backend {name} does not run on this device: {error}")
    return found


def _attention(device: torch.device, kernel: block_kernels.Kernel, lengths: tuple[int, ...]) -> dict[str, Any]:
    """TFLOP/s of causal attention, counted half, in each direction, by a kernel as training calls it."""
    forward, backward = [], []
    for length in lengths:
        shape = (1, 8, length, HEAD_DIM)
        q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
        flops = 4 * 8 * HEAD_DIM * length * length / 2
        block, options = Block(None, (0, length), (0, length), CAUSAL, 0, 0), block_kernels.Options(HEAD_DIM**-0.5)
        out, lse = kernel.forward(q, k, v, block, options)
        there = seconds(device, partial(kernel.forward, q, k, v, block, options))
        back = seconds(device, partial(kernel.backward, dout, q, k, v, out, lse, block, options))
        forward.append(flops / there / 1e12)
        backward.append(2.5 * flops / back / 1e12)
    return {"lengths": list(lengths), "forward": {HEAD_DIM: forward}, "backward": {HEAD_DIM: backward}}


def _all_reduce(device: torch.device, size: int) -> float:
    """NCCL's bus bandwidth."""
    tensor = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    ranks = dist.get_world_size()
    return 2 * size * (ranks - 1) / ranks / seconds(device, lambda: dist.all_reduce(tensor))
