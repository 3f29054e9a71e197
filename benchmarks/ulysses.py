"""Ulysses attention on gloo ranks: bytes and exchanges counted, time beside DeepSpeed's.

    python -m benchmarks.ulysses [--ranks 2 4] [--kv-heads 16 4]

One attention layer, forward and backward, s 8192, 16 query heads of 64. Two modes: `exchange` puts the identity in the
place of attention, which leaves collectives and layout copies; `layer` has PyTorch's flash attention in all.

Exact: what megasp sends must equal the closed form, per rank, forward + backward, r copies of each kv head:

    2 (P - 1) / P x c b (2 dq + 2 r dkv) B bytes in 4 exchanges

Peers: deepspeed.sequence.layer.DistributedAttention, and UlyssesSPAttentionHF, which alone takes fewer kv heads than
ranks. Their bytes are counted by the same rule around torch.distributed's functions. Everyone first shows, on a short
sequence, that output and gradients equal those of one process.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import Contestant, Outcome, play, ratio, record, table
from benchmarks.trainers import version
from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.sequence_parallel import UlyssesAttention, attend

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Sent = tuple[int, int]
"""Exchanges of all ranks with all (whatever each takes underneath), and bytes that left a rank in one call."""


@dataclass(frozen=True)
class Case:
    """One attention layer: heads, positions of the whole sequence, and whether attention is the identity."""

    kv_heads: int
    exchange: bool
    sequence: int = 8192
    heads: int = 16
    head_dim: int = 64

    def expected(self, ranks: int) -> Sent:
        """What the closed form says, fp32."""
        copies = max(1, ranks // self.kv_heads)
        channels = 2 * self.heads * self.head_dim + 2 * copies * self.kv_heads * self.head_dim
        return 4, 2 * (ranks - 1) * (self.sequence // ranks) * channels * 4 // ranks


class _Identity(torch.autograd.Function):
    """q, k, v [..., heads, H] -> q; the gradients of k and v are the first heads of q's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.kv_heads = k.shape[-2]
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = dout[..., : ctx.kv_heads, :]
        return dout, part, part


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on [B, S, heads, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def megasp_layer(case: Case) -> tuple[Layer, Callable[[], Sent]]:
    """megasp's, and what it has sent since the last call."""
    axis = parallel_state.build(Layout(ulysses=dist.get_world_size()), torch.device("cpu")).ulysses

    def identity(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return _Identity.apply(q, k, v), None

    layer = UlyssesAttention(identity if case.exchange else attend, axis)

    def sent() -> Sent:
        found = axis.traffic.total_calls, axis.traffic.total_bytes
        axis.traffic.reset()
        return found

    # [1, S, heads, H] <-> [S, 1, heads, H] moves nothing.
    return lambda q, k, v: layer(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1), sent


def _deepspeed() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed = importlib.import_module("deepspeed")
        deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def _count_collectives() -> Callable[[], Sent]:
    """Wrap torch.distributed's functions; returns what they have sent since the last call."""
    total = [0, 0]

    def counted(function: Callable[..., Any], argument: int, share: Callable[[int, int], int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            named = next((kwargs[key] for key in ("input", "tensor", "input_tensor") if key in kwargs), None)
            x = args[argument] if len(args) > argument else named
            assert x is not None
            total[0] += 1
            total[1] += share(x.nbytes, dist.get_world_size(kwargs.get("group")))
            return function(*args, **kwargs)

        return call

    for name, argument, share in (
        ("all_to_all_single", 1, lambda n, ranks: n * (ranks - 1) // ranks),
        ("all_gather", 1, lambda n, ranks: n * (ranks - 1)),
        ("all_gather_into_tensor", 1, lambda n, ranks: n * (ranks - 1)),
        ("all_reduce", 0, lambda n, ranks: 2 * n * (ranks - 1) // ranks),
    ):
        setattr(dist, name, counted(getattr(dist, name), argument, share))

    def sent() -> Sent:
        found = total[0], total[1]
        total[:] = [0, 0]
        return found

    return sent


def distributed_attention_layer(case: Case) -> tuple[Layer, Callable[[], Sent]]:
    """deepspeed.sequence.layer.DistributedAttention."""
    _deepspeed()
    sent = _count_collectives()
    from deepspeed.sequence.layer import DistributedAttention

    class Local(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _Identity.apply(q, k, v) if case.exchange else sdpa(q, k, v)

    layer = DistributedAttention(Local(), dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: layer(q, k, v, 0), sent


def ulysses_hf_layer(case: Case) -> tuple[Layer, Callable[[], Sent]]:
    """deepspeed's UlyssesSPAttentionHF around transformers' attention interface."""
    _deepspeed()
    sent = _count_collectives()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any) -> tuple[Any, ...]:
        if case.exchange:
            return _Identity.apply(*(x.transpose(1, 2) for x in (q, k, v))), None
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)

    ranks, rank = dist.get_world_size(), dist.get_rank()
    local = case.sequence // ranks
    layer = UlyssesSPAttentionHF(
        attention,
        batch_size=1,
        attn_head_count=case.heads,
        attn_head_size=case.head_dim,
        kv_head_count=case.kv_heads,
        num_hidden_layers=1,
        process_group=dist.group.WORLD,
        local_seq_length=local,
        global_seq_length=case.sequence,
    )
    module: Any = nn.Module().train()
    # Heads that the ranks hold after kv heads were repeated.
    module.is_causal, module.num_key_value_groups = True, case.heads // max(case.kv_heads, ranks)
    positions = torch.arange(rank * local, (rank + 1) * local)[None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = layer(module, *(x.transpose(1, 2) for x in (q, k, v)), None, position_ids=positions)[0]
        return out.view(1, local, case.heads, case.head_dim)

    return call, sent


LAYERS = {
    "megasp": megasp_layer,
    "DistributedAttention": distributed_attention_layer,
    "UlyssesSPAttentionHF": ulysses_hf_layer,
}


def _shards(case: Case) -> tuple[list[Tensor], Tensor]:
    """This rank's q, k, v (leaves) and output gradient."""
    *whole, dout = _whole(case)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shards = [x.chunk(ranks, 1)[rank].clone().requires_grad_() for x in whole]
    return shards, dout.chunk(ranks, 1)[rank].clone()


def _whole(case: Case) -> list[Tensor]:
    """q, k, v and output gradient of the whole sequence, [1, S, heads, H], the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [torch.randn(1, case.sequence, n, case.head_dim, generator=generator) for n in heads]


def _assert_right(layer: Layer, case: Case) -> None:
    """Output and gradients equal those of one process."""
    *whole, dout = _whole(case)
    leaves = [x.requires_grad_() for x in whole]
    want = sdpa(*leaves)
    want.backward(dout)
    shards, part = _shards(case)
    got = layer(*shards)
    got.backward(part)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, mine, theirs in zip(
        ("out", "dq", "dk", "dv"), [got, *(x.grad for x in shards)], [want, *(x.grad for x in leaves)], strict=True
    ):
        assert mine is not None and theirs is not None
        error = (mine - theirs.chunk(ranks, 1)[rank]).abs().max().item()
        assert error < 1e-4, f"{name} differs from one process's by {error}"


def make_layer(name: str, case: Case) -> Callable[[int], Sent]:
    """One forward and backward per call; returns what this rank sent in it."""
    short = Case(case.kv_heads, exchange=False, sequence=256, heads=case.heads, head_dim=case.head_dim)
    _assert_right(LAYERS[name](short)[0], short)
    layer, sent = LAYERS[name](case)
    qkv, dout = _shards(case)
    sent()

    def call(_: int) -> Sent:
        for x in qkv:
            x.grad = None
        layer(*qkv).backward(dout)
        return sent()

    return call


def run(case: Case, ranks: int, rounds: int, warmup: int) -> list[Outcome]:
    """Measure one case; megasp's counts are asserted."""
    names = ["megasp", "UlyssesSPAttentionHF"]
    if case.kv_heads >= ranks:
        names.insert(1, "DistributedAttention")
    threads = max(1, 2 // ranks)
    outcomes = play([Contestant(name, make_layer, (name, case), ranks, threads) for name in names], rounds, warmup)
    for found in outcomes[0].results:
        assert found == case.expected(ranks), f"sent {found}, the closed form says {case.expected(ranks)}"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[16, 4, 2])
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    lines = []
    for ranks in args.ranks:
        for kv_heads in args.kv_heads:
            for exchange in (True, False):
                case = Case(kv_heads, exchange, args.sequence)
                outcomes = run(case, ranks, args.rounds, args.warmup)
                mode = "exchange" if exchange else "layer"
                print(f"## Ulysses, {mode}, {ranks} ranks, 16 heads, {kv_heads} kv heads, s {args.sequence}, fp32\n")
                print(table(outcomes), "\n")
                for outcome in outcomes:
                    exchanges, sent = outcome.results[-1]
                    name, share = outcome.contestant.name, ratio(outcomes[0], outcome).text()
                    print(f"- {name}: {exchanges} exchanges, {sent:,} bytes; ours / its time {share}")
                print("- megasp's equal the closed form\n", flush=True)
                sent_by = {outcome.contestant.name: outcome.results[-1] for outcome in outcomes}
                case_line = {"mode": mode, "ranks": ranks, "kv_heads": kv_heads, "sequence": args.sequence}
                lines.append(case_line | {"sent": sent_by, "contestants": record(outcomes)})
    versions = [f"torch {torch.__version__}", version("deepspeed")]
    print(json.dumps({"benchmark": "ulysses", "versions": versions, "rounds": args.rounds, "cases": lines}))


if __name__ == "__main__":
    main()
