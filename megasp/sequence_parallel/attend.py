"""Attention over a sequence that is split over the ring axis: runs the steps of a schedule.

Every mode (ring, LightSeq, all-gather; one rank alone) is the same loop here. A step posts its messages, computes its
tasks block by block while they travel, and takes what arrived. What arrives is used in the next step and then let go.
Partial outputs and gradients are summed in fp32 or wider.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasp.collectives import start_exchange
from megasp.parallel_state import Axis
from megasp.sequence_parallel.block_kernels import AttentionDropout, Kernel, Options
from megasp.sequence_parallel.blocks import Block, Mask
from megasp.sequence_parallel.kernels import KERNELS, choose
from megasp.sequence_parallel.parcels import Parcel, Partial
from megasp.sequence_parallel.schedules import DKV, DQ, KV, OUT, Message, Q, Step
from megasp.sequence_parallel.work import Work

ONE_RANK = Axis("ring")
Key = tuple[str, int, int]
"""(what, owner, part of the heads)."""


@dataclass
class Kept:
    """Out and lse of one attention, for a recompute of its layer that does not run attention again."""

    result: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Job:
    """One attention on this rank."""

    work: Work
    axis: Axis
    kernel: Kernel
    options: Options
    kept: Kept | None = None

    def heads(self, heads: int, part: int) -> slice:
        """Those of `heads` heads that belong to one part."""
        each = heads // self.work.schedule.parts
        return slice(part * each, (part + 1) * each)


def _index(block: Block, columns: tuple[int, int], heads: slice) -> tuple[slice, slice, slice]:
    """The samples, heads and columns of a block in a tensor [B, heads, S, ...]."""
    return slice(None) if block.row is None else slice(block.row, block.row + 1), heads, slice(*columns)


class _Run:
    """One direction of an attention on this rank: what it holds and sends, by key.

    Args:
        own: this rank's tensors, [B, heads, S, ...] of any strides.
        like: what -> tensors of the shapes and dtypes of such a message; all shards are of one size.
    """

    def __init__(self, axis: Axis, own: dict[Key, tuple[Tensor, ...]], like: dict[str, tuple[Tensor, ...]]) -> None:
        self.axis, self.own, self.like = axis, own, like
        self.arrived: dict[Key, Parcel] = {}
        self.outputs: dict[int, Partial] = {}
        self.sums: dict[Key, Parcel] = {}

    def steps(self, steps: tuple[Step, ...]) -> Iterator[Step]:
        """Each step, with its messages on their way while the caller computes."""
        rank = self.axis.rank
        packed: dict[Key, Parcel] = {}  # own tensors that go to several ranks are copied once
        for step in steps:
            sends = [(self._outgoing(m, packed).buffer, m.target) for m in step.messages if m.source == rank]
            incoming = [(m, Parcel.empty(self.like[m.what])) for m in step.messages if m.target == rank]
            pending = start_exchange(sends, [(parcel.buffer, m.source) for m, parcel in incoming], self.axis)
            yield step
            pending.wait()
            self.arrived = {}
            for message, parcel in incoming:
                self._receive(message, parcel)

    def _outgoing(self, message: Message, packed: dict[Key, Parcel]) -> Parcel:
        key = (message.what, message.owner, message.part)
        if message.what == OUT:
            partial = self.outputs.pop(message.owner)
            return Parcel.of((partial.lse, partial.out.to(self.like[OUT][1].dtype)))
        if message.what in (DKV, DQ):
            return self.sums.pop(key)
        if key in self.arrived:
            return self.arrived[key]
        if key not in packed:
            packed[key] = Parcel.of(self.own[key])
        return packed[key]

    def _receive(self, message: Message, parcel: Parcel) -> None:
        key = (message.what, message.owner, message.part)
        if message.what == OUT:
            lse, out = parcel.tensors
            self.outputs[message.owner].merge(out, lse)
        elif message.what in (DKV, DQ):
            self.sum(key).add_(parcel)
        else:
            self.arrived[key] = parcel

    def held(self, key: Key) -> tuple[Tensor, ...]:
        return self.arrived[key].tensors if key in self.arrived else self.own[key]

    def output(self, owner: int, q: Tensor) -> Partial:
        """What has been computed of the output of `owner`'s queries."""
        if owner not in self.outputs:
            self.outputs[owner] = Partial(q)
        return self.outputs[owner]

    def sum(self, key: Key) -> Parcel:
        """What has been computed of a gradient."""
        if key not in self.sums:
            self.sums[key] = Parcel.zeros(self.like[key[0]])
        return self.sums[key]


def _forward(q: Tensor, k: Tensor, v: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """out [B, N, S, H] in q's dtype and lse [B, N, S] of this rank's queries."""
    work, rank = job.work, job.axis.rank
    if work.whole is not None:
        return job.kernel.forward(q, k, v, work.whole, job.options)
    parts = [job.heads(k.shape[1], part) for part in range(work.schedule.parts)]
    own = {(KV, rank, part): (k[:, heads], v[:, heads]) for part, heads in enumerate(parts)}
    mine = Partial(q)
    like = {KV: own[KV, rank, 0], Q: (q,), OUT: (mine.lse, q)}
    run = _Run(job.axis, {**own, (Q, rank, 0): (q,)}, like)
    run.outputs[rank] = mine
    for step in run.steps(work.schedule.forward):
        for task in step.tasks:
            if task.rank != rank:
                continue
            heads = job.heads(q.shape[1], task.part)
            options = job.options.for_heads(heads.start)
            (queries,), (keys, values) = run.held((Q, task.q, 0)), run.held((KV, task.k, task.part))
            output = run.output(task.q, q)
            for block in work.blocks(task.q, task.k):
                rows, columns = _index(block, block.q, heads), _index(block, block.k, slice(None))
                out, lse = job.kernel.forward(queries[rows], keys[columns], values[columns], block, options)
                output.merge(out, lse, rows)
    return mine.out.to(q.dtype), mine.lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, job: _Job
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shards."""
    work, rank = job.work, job.axis.rank
    if work.whole is not None:
        return job.kernel.backward(dout, q, k, v, out, lse, work.whole, job.options)
    parts = [job.heads(k.shape[1], part) for part in range(work.schedule.parts)]
    own = {(KV, rank, part): (k[:, heads], v[:, heads]) for part, heads in enumerate(parts)}
    queries = (lse, q, dout, out)
    wide_kv = tuple(lse.new_empty(()).expand(x.shape) for x in own[KV, rank, 0])  # shapes and a dtype, no memory
    like = {KV: own[KV, rank, 0], Q: queries, DKV: wide_kv, DQ: (lse.new_empty(()).expand(q.shape),)}
    run = _Run(job.axis, {**own, (Q, rank, 0): queries}, like)
    for step in run.steps(work.schedule.backward):
        for task in step.tasks:
            if task.rank != rank:
                continue
            heads = job.heads(q.shape[1], task.part)
            options = job.options.for_heads(heads.start)
            held, (keys, values) = run.held((Q, task.q, 0)), run.held((KV, task.k, task.part))
            (dq,), (dk, dv) = run.sum((DQ, task.q, 0)).tensors, run.sum((DKV, task.k, task.part)).tensors
            for block in work.blocks(task.q, task.k):
                rows, columns = _index(block, block.q, heads), _index(block, block.k, slice(None))
                lse_b, q_b, dout_b, out_b = (x[rows] for x in held)
                gradients = job.kernel.backward(
                    dout_b, q_b, keys[columns], values[columns], out_b, lse_b.contiguous(), block, options
                )
                for total, gradient in zip((dq[rows], dk[columns], dv[columns]), gradients, strict=True):
                    total += gradient
    (dq,) = run.sum((DQ, rank, 0)).tensors
    by_part = [run.sum((DKV, rank, part)).tensors for part in range(len(parts))]
    dk, dv = (torch.cat(tensors, 1) if len(parts) > 1 else tensors[0] for tensors in zip(*by_part, strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attend(torch.autograd.Function):
    """Saves this rank's q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        kept = job.kept.result if job.kept is not None else None
        out, lse = kept or _forward(q, k, v, job)
        if job.kept is not None:
            job.kept.result = (out, lse) if kept is None else None
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        ctx.mark_non_differentiable(lse)
        return out.permute(2, 0, 1, 3), lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = _backward(dout.permute(1, 2, 0, 3), q, k, v, out, lse, ctx.job)
        return *(x.permute(2, 0, 1, 3) for x in gradients), None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    work: Work | None = None,
    *,
    axis: Axis = ONE_RANK,
    backend: str = "auto",
    scale: float | None = None,
    dropout: AttentionDropout | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks of `axis`.

    Args:
        q: [S, B, N, H], the positions `work.held[axis.rank]`.
        k, v: [S, B, G, H], the same positions; G divides N.
        work: what to compute where; causal attention over the S positions of one rank without it.
        axis: the ring axis; every rank of it calls this with the same `work`.
        backend: a kernel's name, or "auto".
        scale: of the scores; 1 / sqrt(H) without it.
        dropout: of the probabilities; only "unfused" serves it.
        kept: filled by a first call, and used instead of computing by the second, which empties it.
    Returns:
        out [S, B, N, H] and lse [B, N, S] (not differentiable).
    """
    probability = dropout.probability if dropout is not None else 0.0
    name = choose(backend, q.device.type, q.dtype, probability, q.shape[-1])
    work = work or Work((((0, q.shape[0]),),), Mask())
    options = Options(scale or q.shape[-1] ** -0.5, dropout)
    return _Attend.apply(q, k, v, _Job(work, axis, KERNELS[name, q.device.type], options, kept))
