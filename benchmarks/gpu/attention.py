"""The CUDA attention kernels: right against the mathematics, and how fast.

    python benchmarks/gpu/attention.py [--seq-lengths 4096 16384 65536] [--heads 32] [--kv-heads 8] [--head-dim 128]

First every kernel that this machine has does blocks of every kind, packed documents, and merged windows, forward and
backward, in bf16, against fp32 mathematics: the largest error relative to the largest value (bf16 rounds at 4e-3). Then
TFLOP/s of causal attention, forward and backward: of the kernel on one rank, and of one rank's share of each mode, with
that many tokens on each of 8 ranks and messages that a fake process group delivers at once. Exit status 1 where a
kernel is wrong. Without a CUDA device it says so and ends.
"""

import argparse
import itertools
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasp import parallel_state
from megasp.config.kernels import ATTENTION_KERNELS
from megasp.config.layout import Layout
from megasp.sequence_parallel import Mask, SequenceAttention, SparseMask, Work, attend, sparse_attend
from megasp.sequence_parallel.kernels import available
from megasp.sequence_parallel.shards import shards

CHECKS = {
    "causal": (Mask(), None),
    "documents": (Mask(), [np.array([0, 1, 2, 130, 131, 400]), np.array([0, 77])]),
    "window": (Mask(100), None),
    "window, sinks, documents": (Mask(37, 3), [np.array([0, 1, 2, 130, 131, 400]), np.array([0, 77])]),
}


MODES = {"a2a": (0, "p2p"), "p2p": (1, "p2p"), "all_gather": (1, "all_gather"), "lightseq": (1, "lightseq"),
         "a2a+p2p": (2, "p2p")}  # fmt: skip
"""Mode -> Ulysses ranks (0 for all) and how the ring's exchange."""


def inputs(length: int, samples: int, a: argparse.Namespace, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    shapes = [(length, samples, count, a.head_dim) for count in heads]
    return [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]


def results(tensors: list[Tensor], work: Work, name: str) -> list[Tensor]:
    """out, dq, dk, dv."""
    *qkv, dout = tensors
    qkv = [x.requires_grad_() for x in qkv]
    out, _ = attend(*qkv, work, backend=name)
    return [out, *torch.autograd.grad(out, qkv, dout)]


def check(name: str, a: argparse.Namespace) -> bool:
    """Errors of a kernel where a shard has two ranges, as in a ring; whether they are of rounding."""
    right = True
    tensors = inputs(512, 2, a)
    for title, (mask, documents) in CHECKS.items():
        work = Work((((0, 256), (300, 556)),), mask, documents)
        want = results([x.detach().float() for x in tensors], work, "unfused")
        got = results([x.detach() for x in tensors], work, name)
        right &= report(name, title, got, want)
    return right


def check_sparse(a: argparse.Namespace) -> bool:
    """FlexAttention by a mask function against the same in tiles of the mathematics, fp32, on the CPU."""
    right = True

    def strided(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key < 100) | (key % 7 == head % 7))

    for title, documents in (("sparse", None), ("sparse, documents", CHECKS["documents"][1])):
        tensors, work = inputs(512, 2, a), Work((((0, 512),),), documents=documents)

        def both(tensors: list[Tensor], work: Work = work) -> list[Tensor]:
            *qkv, dout = tensors
            qkv = [x.requires_grad_() for x in qkv]
            out, _ = sparse_attend(*qkv, work, mask=SparseMask(strided))
            return [out, *torch.autograd.grad(out, qkv, dout)]

        want = both([x.detach().float().cpu() for x in tensors])
        got = both([x.detach() for x in tensors])
        right &= report("flex", title, [x.cpu() for x in got], want)
    return right


def report(name: str, title: str, got: list[Tensor], want: list[Tensor]) -> bool:
    """Print the errors of out, dq, dk and dv; whether they are of rounding."""
    errors = [float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(got, want, strict=True)]
    right = all(error < 2e-2 for error in errors)  # NaN is not
    shown = " ".join(f"{part} {error:.1e}" for part, error in zip(("out", "dq", "dk", "dv"), errors, strict=True))
    print(f"{name:14} {title:26} {shown}  {'ok' if right else 'WRONG'}")
    return right


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def speed(name: str, length: int, a: argparse.Namespace) -> None:
    """TFLOP/s; the backward is five products where the forward is two."""
    *qkv, dout = inputs(length, 1, a)
    qkv = [x.requires_grad_() for x in qkv]
    work = Work((((0, length),),))
    forward = milliseconds(lambda: attend(*qkv, work, backend=name))
    out, _ = attend(*qkv, work, backend=name)
    backward = milliseconds(lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True))
    operations = 2 * length * length * a.heads * a.head_dim  # q k^T and p v, of half the pairs
    rates = operations / forward / 1e9, 2.5 * operations / backward / 1e9
    print(f"{name:14} {length:8} tokens   forward {rates[0]:7.1f}   backward {rates[1]:7.1f} TFLOP/s")


def speed_of_mode(name: str, mode: str, length: int, a: argparse.Namespace, device: str = "cuda") -> None:
    """One rank's share of a mode under a fake process group: its kernels, merges and copies, without the waiting."""
    ulysses, comm = MODES[mode]
    layout = Layout(ulysses=ulysses or a.ranks, ring=a.ranks // (ulysses or a.ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=a.ranks)
    try:
        state = parallel_state.build(layout, torch.device(device))
        attention = SequenceAttention(state, shards(length, layout.ring, layout.ulysses, comm), name, comm)
        *qkv, dout = inputs(length // a.ranks, 1, a, device)
        qkv = [x.requires_grad_() for x in qkv]
        work = attention.work(length // a.ranks, a.heads, a.kv_heads)
        forward = milliseconds(lambda: attention(*qkv, work))
        out = attention(*qkv, work)
        backward = milliseconds(lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True))
        operations = 4 * sum(map(work.pairs, work.tasks(0))) * a.heads // layout.ulysses * a.head_dim
        rates = operations / forward / 1e9, 2.5 * operations / backward / 1e9
        print(f"{name:14} {length:8} tokens   forward {rates[0]:7.1f}   backward {rates[1]:7.1f} TFLOP/s   {mode}")
    finally:
        dist.destroy_process_group()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seq-lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    for option, default in {"heads": 32, "kv-heads": 8, "head-dim": 128, "ranks": 8}.items():
        p.add_argument(f"--{option}", type=int, default=default)
    a = p.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device")
        return 0
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    names = [name for name, here, _ in available() if here and "bfloat16" in ATTENTION_KERNELS[name].devices["cuda"]]
    right = [*(check(name, a) for name in names), check_sparse(a)]
    for name, length in itertools.product((name for name in names if name != "unfused"), a.seq_lengths):
        speed(name, length, a)
        for mode in MODES:
            speed_of_mode(name, mode, a.ranks * length, a)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
