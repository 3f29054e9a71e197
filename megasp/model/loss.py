"""The output head and cross entropy in one: the logits of the whole batch never exist.

For some rows of hidden states at a time: logits of this rank's part of the vocabulary, their softmax's sums merged over
the tensor-parallel ranks, the loss, and at once the gradients, which are kept in place of the logits (they are as small
as the hidden states and the weight). So the head's GEMMs run once each, and there is nothing to recompute.
Vocab-parallel cross entropy: arXiv 1909.08053 section 3; chunked and fused with the head: as in arXiv 2410.10989.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megasp.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megasp.footprint import Part
from megasp.model.elementwise import Body, Run, eager
from megasp.model.matmul import linear, product
from megasp.model.weight_gradients import gradient_dtype
from megasp.parallel_state import Axis

CHUNK_BYTES = 128 * 2**20
"""Size of the logits that exist at a time, in the model's dtype."""

CACHE_BYTES = 2**20
"""Size of the fp32 logits that a CPU passes over at a time, so that they stay in its cache between the passes."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor,
        axis: Axis,
        split: bool,
        chunk: int,
        train: bool,
        run: Run,
    ) -> Tensor:
        ctx.axis, ctx.split = axis, split
        full = start_all_gather(hidden, axis).wait() if split else hidden
        rows, labels, mask = full.reshape(-1, full.shape[-1]), labels.reshape(-1), mask.reshape(-1)
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        dhidden = torch.empty_like(rows) if train else None
        dweight: Tensor | None = None
        # Without the loss's divisor, which comes with the backward, a sum over many rows may be too large for fp16.
        dtype = wide if weight.dtype == torch.float16 else gradient_dtype(weight)
        # A frozen head has no third product.
        dtypes = (dtype, wide if chunk < rows.shape[0] else dtype) if ctx.needs_input_grad[1] else ()
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            data = rows[part], labels[part], mask[part]
            dpart = None if dhidden is None else dhidden[part]
            dweight = _add_chunk(loss, dpart, dweight, data, weight, axis, dtypes, run)
        if dhidden is not None:
            ctx.save_for_backward(dhidden.view_as(full), None if dweight is None else dweight.to(dtype))
            ctx.dtype = gradient_dtype(weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        reduce = start_reduce_scatter if ctx.split else start_all_reduce
        pending = reduce(dhidden.mul_(grad), ctx.axis)
        if dweight is not None:
            dweight = dweight.mul_(grad).to(ctx.dtype)
        return pending.wait(), dweight, None, None, None, None, None, None, None


def _add_chunk(
    loss: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    data: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    axis: Axis,
    dtypes: Sequence[torch.dtype],
    run: Run,
) -> Tensor | None:
    """Add some rows' loss to `loss`, leave their gradient in `dhidden`, and return the sum of the weight's.

    Args:
        dhidden: [R, D]; None without training.
        dweight: of the rows before; None at the first.
        data: hidden [R, D], labels and mask [R].
        dtypes: of the weight's gradient, and of its sum; empty where it is not wanted.
        run: as `_chunk_loss` takes it.
    """
    chunk_loss, dlogits = _chunk_loss(data[0], weight, *data[1:], axis, dhidden is not None, run)
    loss += chunk_loss
    if dhidden is None or dlogits is None:
        return None
    dhidden.copy_(linear(dlogits, weight.t()))
    if not dtypes:
        return None
    part = product(dlogits.t(), data[0].t(), dtypes[0])
    return part.to(dtypes[1]) if dweight is None else dweight.add_(part)


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, axis: Axis, train: bool, run: Run
) -> tuple[Tensor, Tensor | None]:
    """Masked sum of the losses of some rows, and its gradient by this rank's logits.

    hidden [R, D], weight [V / T, D], labels and mask [R] -> scalar, [R, V / T] or None.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = linear(hidden, weight)
    local = labels - axis.rank * weight.shape[0]
    elsewhere = (local < 0) | (local >= weight.shape[0])
    local = local.masked_fill(elsewhere, 0)[:, None]
    target = logits.gather(1, local).squeeze(1).to(wide).masked_fill(elsewhere, 0)
    largest, total = run(_SUMS, logits)
    statistics = torch.stack((largest.squeeze(1), total.squeeze(1), target))
    every_largest, every_total, every_target = start_all_gather(statistics[None], axis).wait().unbind(1)
    full_largest = every_largest.amax(0)
    full_total = ((every_largest - full_largest).exp() * every_total).sum(0)
    loss = ((full_total.log() + (full_largest - every_target.sum(0))) * mask).sum()
    if not train:
        return loss, None
    mask = mask.to(wide)
    scale = (largest - full_largest[:, None]).exp() / full_total[:, None] * mask[:, None]
    at_label = (-mask).masked_fill(elsewhere, 0)[:, None]
    run(_GRADIENT, logits, largest, scale, local, at_label)
    return loss, logits


def _sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest logit and the sum of exp(logit - largest), [R, 1]; in place of the logits these exps."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest, total = (logits.new_empty((logits.shape[0], 1), dtype=wide) for _ in range(2))
    for rows in _passes(logits, wide):
        part = logits[rows].to(wide)
        largest[rows] = part.amax(1, keepdim=True)
        total[rows] = part.sub_(largest[rows]).exp_().sum(1, keepdim=True)
        logits[rows] = part  # which it already is where the dtypes are the same
        del part
    return largest, total


def _sums_whole(logits: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(1, keepdim=True)
    return largest, (wide - largest).exp().sum(1, keepdim=True)


def _gradient(exps: Tensor, largest: Tensor, scale: Tensor, label: Tensor, at_label: Tensor) -> None:
    """In place: exps * scale, and at_label more at the label; each [R, 1]."""
    for rows in _passes(exps, scale.dtype):
        dlogits = exps[rows].to(scale.dtype).mul_(scale[rows])
        exps[rows] = dlogits.scatter_add_(1, label[rows], at_label[rows])


def _gradient_whole(logits: Tensor, largest: Tensor, scale: Tensor, label: Tensor, at_label: Tensor) -> None:
    """The same of the logits themselves."""
    dlogits = (logits.to(scale.dtype) - largest).exp() * scale
    hit = torch.arange(logits.shape[1], device=logits.device) == label
    logits.copy_(dlogits + torch.where(hit, at_label, 0))


_SUMS, _GRADIENT = Body("softmax's sums", _sums, _sums_whole), Body("loss's gradient", _gradient, _gradient_whole)


def _passes(logits: Tensor, wide: torch.dtype) -> list[slice]:
    """The rows of logits to work on at a time."""
    count = logits.shape[0]
    step = max(1, CACHE_BYTES // (logits.shape[1] * wide.itemsize)) if logits.device.type == "cpu" else count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    axis: Axis,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    run: Run = eager,
) -> Tensor:
    """Sum over tokens of mask * cross entropy(softmax(hidden weight^T), label), in fp32 or wider.

    Args:
        hidden: [S, B, D], or this rank's [S / T, B, D] with sequence parallelism.
        weight: [V / T, D], this rank's rows of the head.
        labels: int64 [S, B], ids in [0, V).
        mask: [S, B], the weight of each token's loss (0 or 1).
        axis: the tensor-parallel axis.
        chunk_bytes: of the logits that exist at a time, in the model's dtype; `CHUNK_BYTES` without it.
        run: who passes over the logits.
    Returns:
        A scalar, the same on every rank of the axis. It may be differentiated once.
    """
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // (weight.shape[0] * weight.itemsize))
    train = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, labels, mask, axis, sequence_parallel, rows, train, run)


def loss_footprint(
    rows: int,
    size: int,
    vocabulary: int,
    item: int,
    gradient: int,
    split: int = 1,
    chunk_bytes: int | None = None,
    compiled: bool = False,
) -> Part:
    """Bytes of head and loss: `rows` rows of `size` features, of which each of `split` ranks holds a shard, and this
    rank's `vocabulary` rows of the head, whose gradient is made in `gradient` bytes an element."""
    wide = max(item, 4)
    chunk = min(rows, max(1, (chunk_bytes or CHUNK_BYTES) // (vocabulary * item)))
    hidden, weight = rows * size * item, vocabulary * size * gradient
    total = vocabulary * size * wide if chunk < rows else 0  # where there are several, their sum is wide
    logits = chunk * vocabulary * (item + (wide if item < wide and not compiled else 0))
    products = chunk * (vocabulary + size) * item + weight
    forward = hidden * (1 + (split > 1)) + total + max(logits, products)
    kept = {"head's gradients": hidden + weight}
    backward = max(hidden // split if split > 1 else 0, wide)
    return Part("loss", wide, forward, backward, kept, keeps_input=False, gradients=weight)
