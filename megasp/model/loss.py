"""The output head and cross entropy in one: the logits of the whole batch never exist.

For some rows of hidden states at a time: logits of this rank's part of the vocabulary, their log-sum-exp merged over
the tensor-parallel ranks, the loss, and at once the gradients, which are kept in place of the logits (they are as small
as the hidden states and the weight). So the head's GEMMs run once each, and there is nothing to recompute.
Vocab-parallel cross entropy: arXiv 1909.08053 section 3; chunked and fused with the head: as in arXiv 2410.10989.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megasp.parallel_state import Axis

CHUNK_BYTES = 128 * 2**20
"""Size of the fp32 logits that exist at a time."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, axis: Axis, split: bool, train: bool
    ) -> Tensor:
        ctx.axis, ctx.split = axis, split
        full = start_all_gather(hidden, axis).wait() if split else hidden
        rows = full.reshape(-1, full.shape[-1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        chunk = max(1, CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
        loss = torch.zeros((), dtype=wide, device=rows.device)
        dhidden = torch.empty_like(rows) if train else None
        dweight: Tensor | None = None
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            chunk_loss, dlogits = _chunk_loss(
                rows[part], weight, labels.reshape(-1)[part], mask.reshape(-1)[part], axis, train
            )
            loss += chunk_loss
            if dhidden is None or dlogits is None:
                continue
            dlogits = dlogits.to(rows.dtype)
            torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is None:
                dweight = (dlogits.t() @ rows[part]).to(wide)
            elif weight.dtype == wide:
                dweight.addmm_(dlogits.t(), rows[part])
            else:
                dweight += dlogits.t() @ rows[part]
        if dhidden is not None and dweight is not None:
            ctx.save_for_backward(dhidden.view_as(full), dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        reduce = start_reduce_scatter if ctx.split else start_all_reduce
        pending = reduce(dhidden.mul_(grad), ctx.axis)
        dweight.mul_(grad)
        return pending.wait(), dweight, None, None, None, None, None


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, axis: Axis, train: bool
) -> tuple[Tensor, Tensor | None]:
    """Masked sum of the losses of some rows, and its gradient by this rank's logits.

    hidden [R, D], weight [V / T, D], labels and mask [R] -> scalar, [R, V / T] or None.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight).to(wide)
    local = labels - axis.rank * weight.shape[0]
    elsewhere = (local < 0) | (local >= weight.shape[0])
    local = local.masked_fill(elsewhere, 0)[:, None]
    target = logits.gather(1, local).squeeze(1).masked_fill(elsewhere, 0)
    largest = logits.amax(1)
    probabilities = torch.softmax(logits, 1)
    # softmax(logits) = exp(logits - lse), so the largest probability gives this rank's lse without a second pass.
    lse = largest - probabilities.amax(1).log()
    every_lse, every_target = start_all_gather(torch.stack((lse, target))[None], axis).wait().unbind(1)
    full_lse = every_lse.logsumexp(0)
    loss = ((full_lse - every_target.sum(0)) * mask).sum()
    if not train:
        return loss, None
    mask = mask.to(wide)
    dlogits = probabilities.mul_(((lse - full_lse).exp() * mask)[:, None])
    dlogits.scatter_add_(1, local, (-mask).masked_fill(elsewhere, 0)[:, None])
    return loss, dlogits


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, axis: Axis, sequence_parallel: bool = False
) -> Tensor:
    """Sum over tokens of mask * cross entropy(softmax(hidden weight^T), label), in fp32 or wider.

    Args:
        hidden: [S, B, D], or this rank's [S / T, B, D] with sequence parallelism.
        weight: [V / T, D], this rank's rows of the head.
        labels: int64 [S, B], ids in [0, V).
        mask: [S, B], the weight of each token's loss (0 or 1).
        axis: the tensor-parallel axis.
    Returns:
        A scalar, the same on every rank of the axis. It may be differentiated once.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, mask, axis, sequence_parallel, torch.is_grad_enabled())
