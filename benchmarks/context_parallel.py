"""Attention over a split sequence, every mode, beside DeepSpeed's DistributedAttention on the same input (gloo ranks).

    python benchmarks/context_parallel.py [--worlds 2 4] [--kv-heads 16 4] [--seq-length 4096] [--documents 512]
    python benchmarks/context_parallel.py --draw 8          # steps of the modes, and their balance (with --documents)
    python benchmarks/context_parallel.py --scale           # 65,536 tokens, ring of 8, against one process
    python benchmarks/context_parallel.py --precision       # bf16's error over the size of the ring; a picture

One row a mode, forward and backward of one attention: bytes and messages that the busiest rank sent (and that they are
those of the closed forms), milliseconds (median), balance (mean over most (query, key) pairs of a rank), and the same
step by step, as ranks that wait for each other see it. DeepSpeed runs if it is installed; its bytes are counted at
torch.distributed. It refuses fewer kv heads than ranks. With documents the positions are those that a run would choose;
`a2a, chunks` exchanges its heads in two chunks.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megasp import parallel_state, verify
from megasp.config.layout import Layout
from megasp.config.load import load, parser
from megasp.local_ranks import run_ranks
from megasp.parallel_state import Traffic
from megasp.sequence_parallel import SequenceAttention, Work, attend
from megasp.sequence_parallel.block_kernels import CPUFlash
from megasp.sequence_parallel.kernels import KERNELS
from megasp.sequence_parallel.schedules import SCHEDULES, draw, simulate
from megasp.sequence_parallel.shards import shards
from megasp.sequence_parallel.traffic import AttentionShape, ring_traffic, ulysses_traffic

MODES = {
    "a2a": "p2p",
    "a2a, chunks": "p2p",
    "p2p": "p2p",
    "all_gather": "all_gather",
    "lightseq": "lightseq",
    "a2a+p2p": "p2p",
}
"""Mode -> how its ring exchanges."""

PICTURE = Path("docs/pictures/bf16_ring.svg")
PRECISION_TOKENS = 1680
"""Divides into two parts for each of 1 to 8 ranks."""
PARTS = "out", "dq", "dk", "dv"


def sizes(mode: str, world: int) -> tuple[int, int] | None:
    """(Ulysses, ring) of a mode; None where it has no such split."""
    if mode.startswith("a2a") and mode != "a2a+p2p":
        return world, 1
    if mode == "a2a+p2p":
        return (2, world // 2) if world % 2 == 0 and world > 2 else None
    return 1, world


def inputs(a: argparse.Namespace, kv_heads: int) -> list[Tensor]:
    """q, k, v and the output's gradient of the whole sequence, the same on every rank: [S, 1, heads, H]."""
    generator = torch.Generator().manual_seed(0)
    heads = (a.heads, kv_heads, kv_heads, a.heads)
    return [torch.randn(a.seq_length, 1, count, a.head_dim, generator=generator) for count in heads]


def timed(run: Callable[[], None], steps: int) -> float:
    """Median milliseconds over steps that all ranks begin together."""
    times = []
    for _ in range(steps + 1):
        dist.barrier()
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def balance(work: Work) -> tuple[float, float]:
    """(mean over most work of a rank, the same when ranks wait for each other after every step)."""
    ranks = len(work.held)
    loads = [sum(work.pairs(task) for task in work.tasks(rank)) for rank in range(ranks)]
    return statistics.mean(loads) / max(loads), simulate(work.schedule.forward, ranks, work.pairs)[1]


def measure(a: argparse.Namespace, mode: str, kv_heads: int) -> dict[str, Any]:
    """One mode on this rank."""
    world = dist.get_world_size()
    ulysses, ring = sizes(mode, world) or (1, world)
    state = parallel_state.build(Layout(ulysses=ulysses, ring=ring), torch.device("cpu"))
    held = shards(a.seq_length, ring, ulysses, MODES[mode])
    documents = [np.arange(0, a.seq_length, a.documents)] if a.documents else None
    here = torch.as_tensor(held.of(documents).positions(state.cp.rank))
    *qkv, dout = (x[here] for x in inputs(a, kv_heads))
    chunks = 2 if mode == "a2a, chunks" else 1
    attention = SequenceAttention(state, held, comm=MODES[mode], chunks=chunks)
    work = attention.work(len(here), a.heads, kv_heads, documents)

    def run() -> None:
        for x in qkv:
            x.grad = None
            x.requires_grad_()
        for axis in (state.ulysses, state.ring):
            axis.traffic.reset()
        attention(*qkv, work).backward(dout)

    milliseconds = timed(run, a.steps)
    shape = AttentionShape(len(here), 1, a.heads, kv_heads, a.head_dim, torch.float32)
    formula, sent = Traffic(), Traffic()
    for direction in (
        *ring_traffic(shape, work, ulysses, state.ulysses.rank, state.ring.rank, chunks),
        *ulysses_traffic(shape, ulysses, state.ulysses.rank, chunks),
    ):
        formula.add_all(direction)
    for axis in (state.ulysses, state.ring):
        sent.add_all(axis.traffic)
    return {
        "bytes": sent.total_bytes,
        "messages": sent.total_calls,
        "exact": (sent.total_bytes, sent.total_calls) == (formula.total_bytes, formula.total_calls),
        "ms": milliseconds,
        "balance": balance(work),
    }


def measure_deepspeed(a: argparse.Namespace, kv_heads: int) -> dict[str, Any]:
    """DistributedAttention around torch's scaled_dot_product_attention."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.init_distributed("gloo", verbose=False)
    sent = Traffic()
    plain = dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        world = dist.get_world_size(kwargs.get("group"))
        sent.add("all_to_all", input.nbytes * (world - 1) // world)
        return plain(output, input, *args, **kwargs)

    class Local(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    world, rank = dist.get_world_size(), dist.get_rank()
    *qkv, dout = (x.transpose(0, 1).chunk(world, 1)[rank].contiguous() for x in inputs(a, kv_heads))
    attention = DistributedAttention(Local(), dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def run() -> None:
        sent.reset()
        for x in qkv:
            x.grad = None
            x.requires_grad_()
        attention(*qkv, 0).backward(dout)

    dist.all_to_all_single = counted
    milliseconds = timed(run, a.steps)
    return {"bytes": sent.total_bytes, "messages": sent.total_calls, "exact": None, "ms": milliseconds, "balance": None}


def compare(a: argparse.Namespace) -> None:
    documents = f"documents of {a.documents}" if a.documents else "one document"
    print(f"{a.seq_length} tokens, {documents}, {a.heads} heads of {a.head_dim}, fp32, one thread a rank")
    print("ranks  kv  mode                 MiB sent  closed form  messages        ms  balance, by step")
    for world, kv_heads in itertools.product(a.worlds, a.kv_heads):
        for mode in MODES:
            if sizes(mode, world):
                line(world, kv_heads, mode, run_ranks(measure, world, a, mode, kv_heads, timeout=600))
        if a.deepspeed and kv_heads >= world and not a.documents:
            line(world, kv_heads, "DeepSpeed", run_ranks(measure_deepspeed, world, a, kv_heads, timeout=600))


def line(world: int, kv_heads: int, name: str, ranks: list[dict[str, Any]]) -> None:
    busiest = max(ranks, key=lambda rank: rank["bytes"])
    exact = {rank["exact"] for rank in ranks}
    formula = "-" if exact == {None} else "DIFFERS" if False in exact else "equal"
    balances = "{:.2f}, {:.2f}".format(*busiest["balance"]) if busiest["balance"] else "-"
    mib, ms = busiest["bytes"] / 2**20, max(rank["ms"] for rank in ranks)
    row = f"{world:5} {kv_heads:3}  {name:19} {mib:9.2f} {formula:>12} {busiest['messages']:9} {ms:9.1f}  {balances}"
    print(row, flush=True)


def draw_modes(ranks: int, document: int) -> None:
    """Steps of the forward of every mode, with the time in units of a full pair of shards (of 64 tokens); of causal
    attention to one document, or to documents of `document` tokens."""
    each = 64
    documents = [np.arange(0, each * ranks, document)] if document else None
    for mode in SCHEDULES:
        held = shards(each * ranks, ranks, 1, mode).of(documents)
        work = Work(held.by_ring(1), documents=documents, comm=mode)
        length, even = simulate(work.schedule.forward, ranks, work.pairs)
        print(f"{mode}: {length / each**2:.2f} long, balance {even:.2f}\n{draw(work.schedule.forward, ranks)}\n")


def scale() -> None:
    """A model of one layer and hidden size 128 on 65,536 tokens: a ring of 8 against one process."""
    flags = (
        "--num-layers 1 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 2 --num-query-groups 1 "
        "--seq-length 65536 --global-batch-size 1 --hidden-dropout 0"
    )
    config, *_ = load(flags.split(), parser("scale", "", [verify.Options]), verify.Options, verify.DEFAULTS)
    began = time.perf_counter()
    for layout, worst in verify.compare(verify.resolve(config), [Layout(ring=8)], steps=1, dtype="fp32"):
        seconds = time.perf_counter() - began
        print(
            f"{layout.name}: loss differs by {worst.loss:.1e}, gradients by {worst.gradient[0]:.1e} ({seconds:.0f} s)"
        )


class NotRounded(CPUFlash):
    """The same kernel on the same numbers, whose results of a block stay in fp32."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return super()._forward(q.float(), k.float(), v.float(), causal, scale)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = (x.float() for x in (dout, q, k, v, out))
        return super()._backward(*wide, lse, causal, scale)


def squared_errors(kernel: CPUFlash) -> list[tuple[float, float]]:
    """(squared error of bf16 against fp64, squared size) of out, dq, dk and dv on this rank of a ring."""
    ring, generator = dist.get_world_size(), torch.Generator().manual_seed(0)
    whole = [torch.randn(PRECISION_TOKENS, 1, n, 64, generator=generator).bfloat16() for n in (4, 2, 2, 4)]
    exact = [x.double().requires_grad_() for x in whole[:3]]
    out, _ = attend(*exact)
    want = [out.detach(), *torch.autograd.grad(out, exact, whole[3].double())]
    state = parallel_state.build(Layout(ring=ring), torch.device("cpu"))
    held = shards(PRECISION_TOKENS, ring, 1)
    here = torch.as_tensor(held.of(None).positions(state.cp.rank))
    *qkv, dout = (x[here] for x in whole)
    qkv = [x.requires_grad_() for x in qkv]
    attention = SequenceAttention(state, held)
    KERNELS["flash", "cpu"] = kernel
    out = attention(*qkv, attention.work(len(here), 4, 2)).bfloat16()
    got = [out.detach(), *torch.autograd.grad(out, qkv, dout)]
    return [
        (float((x.double() - y[here]).square().sum()), float(y[here].square().sum()))
        for x, y in zip(got, want, strict=True)
    ]


def precision() -> None:
    """Relative error, root mean square, of bf16 over the size of the ring; CPU flash attention, 4/2 heads of 64; and
    what it would be if the results of single blocks were not rounded."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "megasp"  # the same errors make the same file
    from matplotlib import pyplot

    rings = range(1, 9)
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    kernels = {"as the kernel gives them": CPUFlash(), "of blocks in fp32": NotRounded()}
    for axis, (title, kernel) in zip(panels, kernels.items(), strict=True):
        found = []
        print(f"results {title}")
        for ring in rings:
            of_ranks = np.array(run_ranks(squared_errors, ring, kernel, timeout=600)).sum(0)
            found.append(np.sqrt(of_ranks[:, 0] / of_ranks[:, 1]))
            errors = (f"{name} {error:.2e}" for name, error in zip(PARTS, found[-1], strict=True))
            print(f"ring {ring}: " + ", ".join(errors), flush=True)
        for name, of_rings in zip(PARTS, zip(*found, strict=True), strict=True):
            axis.plot(rings, of_rings, "o-", label=name, markersize=4)
        axis.set(xlabel="ring size", ylim=(0, None))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
        axis.set_title(f"results {title}", fontsize=10)
    panels[0].set_ylabel("relative error (RMS)")
    panels[0].legend()
    figure.suptitle(f"bf16 against fp64, {PRECISION_TOKENS} tokens", fontsize=10)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})
    print(f"written: {PICTURE}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    p.add_argument("--kv-heads", type=int, nargs="+", default=[16, 4])
    for name, default in {"seq-length": 4096, "heads": 16, "head-dim": 64, "steps": 3, "documents": 0}.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--no-deepspeed", dest="deepspeed", action="store_false", help="leave the peer out")
    p.add_argument("--draw", type=int, metavar="RANKS", help="draw the schedules")
    p.add_argument("--scale", action="store_true", help="one long sequence")
    p.add_argument("--precision", action="store_true", help="bf16 over the size of the ring")
    a = p.parse_args()
    if a.draw:
        draw_modes(a.draw, a.documents)
    elif a.scale:
        scale()
    elif a.precision:
        precision()
    else:
        compare(a)


if __name__ == "__main__":
    main()
