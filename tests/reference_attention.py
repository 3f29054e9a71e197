"""Attention as it is defined, with every score in memory: what all modes are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megasp.sequence_parallel import Mask


def visible(length: int, mask: Mask, starts: Sequence[int] = (0,)) -> Tensor:
    """Which key (column) a query (row) sees, bool [length, length]."""
    begin = torch.tensor([max(start for start in starts if start <= i) for i in range(length)])
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (j <= i) & (begin[:, None] == begin)
    if mask.window is not None:
        seen &= (i - j <= mask.window) | (j < begin + mask.sinks)
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [S, B, N, H], k and v [S, B, G, H], seen bool [B, S, S] -> [S, B, N, H]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("ibnh,jbnh->bnij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnij,jbnh->ibnh", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)
