"""Attention over a sequence that is split over the ring axis: runs the steps of a schedule.

Every mode (ring, LightSeq, all-gather; one rank alone) is the same loop here. A step posts its messages, computes its
tasks block by block while they travel, and takes what arrived. What arrives is used in the next step and then let go.
Partial outputs and gradients are summed in fp32 or wider.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megasp.errors import ConfigError
from megasp.parallel_state import Axis
from megasp.sequence_parallel.block_kernels import AttentionDropout, Kernel, Options, VarlenKernel
from megasp.sequence_parallel.blocks import Block, Mask
from megasp.sequence_parallel.chunks import Chunk
from megasp.sequence_parallel.kernels import KERNELS, choose
from megasp.sequence_parallel.packing import Pack
from megasp.sequence_parallel.parcels import Partial
from megasp.sequence_parallel.schedules import DKV, DQ, KV, OUT, Q, Schedule, Step, Task
from megasp.sequence_parallel.transport import Key, Likes, Own, Transport
from megasp.sequence_parallel.work import Work

ONE_RANK = Axis("ring")


@dataclass
class Kept:
    """Out and lse of one attention, for a recompute of its layer that does not run attention again."""

    result: tuple[Tensor, Tensor] | None = None
    chunks: dict[int, "Kept"] = field(default_factory=dict)

    def for_chunk(self, number: int) -> "Kept":
        """That of one chunk of the heads, where each is an attention of its own."""
        return self.chunks.setdefault(number, Kept())

    def put(self, out: Tensor, lse: Tensor) -> None:
        self.result = out, lse

    def take(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """What was put; not a second time."""
        result, self.result = self.result, None
        return result


@dataclass(frozen=True)
class _OnRing:
    """A rank of the ring axis, as one of the owners between whom attention runs."""

    work: Work
    axis: Axis

    @property
    def number(self) -> int:
        return self.axis.rank

    @property
    def schedule(self) -> Schedule:
        return self.work.schedule

    @property
    def whole(self) -> Block | None:
        return self.work.whole

    def transport(self, own: Own, like: Likes) -> Transport:
        return Transport(self.axis, own, like)


@dataclass(frozen=True)
class _Job:
    """One attention of an owner's queries: a rank's, or a chunk's."""

    owner: _OnRing | Chunk
    kernel: Kernel
    options: Options
    kept: Kept | Chunk | None = None

    def heads(self, heads: int, part: int) -> slice:
        """Those of `heads` heads that belong to one part."""
        each = heads // self.owner.schedule.parts
        return slice(part * each, (part + 1) * each)

    def own_keys(self, k: Tensor, v: Tensor) -> dict[Key, tuple[Tensor, ...]]:
        """The owner's keys and values, by part of the heads."""
        parts = [self.heads(k.shape[1], part) for part in range(self.owner.schedule.parts)]
        return {(KV, self.owner.number, part): (k[:, heads], v[:, heads]) for part, heads in enumerate(parts)}

    def tasks(self, transport: Transport, steps: tuple[Step, ...]) -> Iterator[Task]:
        """The owner's tasks, with each step's messages on their way meanwhile."""
        for step in transport.steps(steps):
            yield from (task for task in step.tasks if task.rank == self.owner.number)

    def calls(self, task: Task) -> tuple[Block | Pack, ...]:
        return self.owner.work.calls(task.q, task.k, isinstance(self.kernel, VarlenKernel))


def _index(block: Block, columns: tuple[int, int], heads: slice) -> tuple[slice, slice, slice]:
    """The samples, heads and columns of a block in a tensor [B, heads, S, ...]."""
    return slice(None) if block.row is None else slice(block.row, block.row + 1), heads, slice(*columns)


def _forward(q: Tensor, k: Tensor, v: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """out [B, N, S, H] in q's dtype and lse [B, N, S] of this rank's queries."""
    owner, number = job.owner, job.owner.number
    if owner.whole is not None:
        return job.kernel.forward(q, k, v, owner.whole, job.options)
    own, mine = job.own_keys(k, v), Partial(q)
    like = {KV: own[KV, number, 0], Q: (q,), OUT: (mine.lse, q)}
    transport = owner.transport({**own, (Q, number, 0): (q,)}, like)
    transport.outputs[number] = mine
    for task in job.tasks(transport, owner.schedule.forward):
        heads = job.heads(q.shape[1], task.part)
        options = job.options.for_heads(heads.start)
        (queries,), (keys, values) = transport.held((Q, task.q, 0)), transport.held((KV, task.k, task.part))
        output = transport.output(task.q, q)
        for call in job.calls(task):
            if isinstance(call, Pack):
                tensors, lengths = call.take((queries[:, heads],), (keys, values))
                out, lse = job.kernel.forward_varlen(*tensors, *lengths, call.causal, options.scale)  # type: ignore[attr-defined]
                output.merge_columns(out.transpose(0, 1)[None], lse[None], call.rows, heads, call.q(q.device)[0])
            else:
                _forward_block((queries,), (keys, values), output, call, job, options, heads)
    # As the model's next product reads it, so that what is kept here is what is kept there: no copy of it.
    out = q.new_empty(q.shape[2], q.shape[0], q.shape[1], q.shape[3]).permute(1, 2, 0, 3)
    return out.copy_(mine.out), mine.lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, job: _Job
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's shards."""
    owner, number = job.owner, job.owner.number
    if owner.whole is not None:
        return job.kernel.backward(dout, q, k, v, out, lse, owner.whole, job.options)
    own, queries = job.own_keys(k, v), (lse, q, dout, out)
    wide_kv = tuple(lse.new_empty(()).expand(x.shape) for x in own[KV, number, 0])  # shapes and a dtype, no memory
    like = {KV: own[KV, number, 0], Q: queries, DKV: wide_kv, DQ: (lse.new_empty(()).expand(q.shape),)}
    transport = owner.transport({**own, (Q, number, 0): queries}, like)
    for task in job.tasks(transport, owner.schedule.backward):
        heads = job.heads(q.shape[1], task.part)
        held, keys = transport.held((Q, task.q, 0)), transport.held((KV, task.k, task.part))
        (dq,), dkv = transport.sum((DQ, task.q, 0)).tensors, transport.sum((DKV, task.k, task.part)).tensors
        mine, sums = tuple(x[:, heads] for x in held), (dq[:, heads], *dkv)
        for call in job.calls(task):
            if isinstance(call, Pack):
                _backward_pack(mine, keys, sums, call, job)
            else:
                _backward_block(mine, keys, sums, call, job, job.options.for_heads(heads.start))
    (dq,) = transport.sum((DQ, number, 0)).tensors
    by_part = [transport.sum((DKV, number, part)).tensors for part in range(owner.schedule.parts)]
    dk, dv = (torch.cat(tensors, 1) if len(by_part) > 1 else tensors[0] for tensors in zip(*by_part, strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


Tensors = tuple[Tensor, ...]


def _forward_block(
    held: Tensors, keys: Tensors, sums: Partial, block: Block, job: _Job, options: Options, heads: slice
) -> None:
    """Merge one block's output into these heads of `sums`; `held` is q, and `keys` are k and v of the heads."""
    rows, columns = _index(block, block.q, heads), _index(block, block.k, slice(None))
    out, lse = job.kernel.forward(held[0][rows], *(x[columns] for x in keys), block, options)
    sums.merge(out, lse, rows)


def _backward_block(held: Tensors, keys: Tensors, sums: Tensors, block: Block, job: _Job, options: Options) -> None:
    """Add one block's gradients to `sums` (dq, dk, dv); `held` is lse, q, dout and out."""
    rows, columns = _index(block, block.q, slice(None)), _index(block, block.k, slice(None))
    lse, q, dout, out = (x[rows] for x in held)
    k, v = (x[columns] for x in keys)
    gradients = job.kernel.backward(dout, q, k, v, out, lse.contiguous(), block, options)
    for total, gradient, index in zip(sums, gradients, (rows, columns, columns), strict=True):
        total[index] += gradient


def _backward_pack(held: Tensors, keys: Tensors, sums: Tensors, pack: Pack, job: _Job) -> None:
    """The same for a pack."""
    (q, dout, out, k, v), lengths = pack.take(held[1:], keys)
    columns = pack.q(q.device)[0]
    lse = held[0][pack.row].index_select(1, columns).contiguous()
    gradients = job.kernel.backward_varlen(  # type: ignore[attr-defined]
        dout, q, k, v, out, lse, *lengths, pack.causal, job.options.scale
    )
    places = columns, pack.k(q.device)[0], pack.k(q.device)[0]
    for total, gradient, place in zip(sums, gradients, places, strict=True):
        total[pack.row].index_add_(1, place, gradient.transpose(0, 1).to(total.dtype))


class _Attend(torch.autograd.Function):
    """Saves this rank's q, k, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        kept = job.kept.take(q) if job.kept is not None else None
        out, lse = kept or _forward(q, k, v, job)
        if job.kept is not None and kept is None:
            job.kept.put(out, lse)
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
    work: Work | Chunk | None = None,
    *,
    axis: Axis = ONE_RANK,
    backend: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    dropout: AttentionDropout | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks of `axis`.

    Args:
        q: [S, B, N, H], the positions `work.held[axis.rank]`.
        k, v: [S, B, G, H], the same positions; G divides N.
        work: what to compute where; attention over the S positions of one rank without it. Or one chunk of them, which
            sees those before it too, and says itself what is kept.
        axis: the ring axis; every rank of it calls this with the same `work`.
        backend: a kernel's name, or "auto".
        causal: without `work`, whether position i sees only keys at or before i.
        scale: of the scores, positive; 1 / sqrt(H) without it.
        dropout: of the probabilities; only "unfused" serves it.
        kept: filled by a first call, and used instead of computing by the second, which empties it.
    Returns:
        out [S, B, N, H] and lse [B, N, S] (not differentiable).

    Raises:
        ConfigError: the kernel cannot serve this, or is not here.
    """
    probability = dropout.probability if dropout is not None else 0.0
    name = choose(backend, q.device.type, q.dtype, probability, q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ConfigError(f"scale {scale}", "kernels multiply scores by a positive number", "multiply q instead")
    options, kernel = Options(scale, dropout), KERNELS[name, q.device.type]
    if isinstance(work, Chunk):
        return _Attend.apply(q, k, v, _Job(work, kernel, options, work))
    work = work or Work((((0, q.shape[0]),),), Mask(causal=causal))
    return _Attend.apply(q, k, v, _Job(_OnRing(work, axis), kernel, options, kept))
