"""Sparse attention by a user's mask function: any attention pattern, split by Ulysses.

    def strided(head, query, key):                       # the names of the field: BigBird, Longformer, strided ...
        return (key <= query) & ((query - key < 256) | (key % 64 == 0))

    attention = UlyssesAttention(sparse_attend, state.ulysses)
    out = attention(q, k, v, mask=SparseMask(strided))
    GPTModel(config, state, attend=SequenceAttention(state, sparse=SparseMask(strided)))

Only tiles in which something is visible are computed: by PyTorch's FlexAttention (arXiv 2412.05496) on CUDA, which
compiles the function into its kernel, and by the mathematics, a row of tiles at a time, elsewhere. Each rank has the
whole sequence for its heads, so the function sees positions and heads as one process does. A ring cuts attention into
blocks of three kinds of mask (`blocks`), of which such a pattern is none: it is refused there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megasp.errors import ConfigError
from megasp.sequence_parallel.block_kernels import AttentionDropout, sum_groups
from megasp.sequence_parallel.work import Work

Visible = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(head, query position, key position), int64 that broadcast -> bool. Heads are those of a tensor-parallel rank."""


@dataclass(frozen=True)
class SparseMask:
    """Which keys each query sees.

    Args:
        visible: says it, causality included: nothing else is hidden but other documents, where these are told apart.
        tile: queries and keys of a tile.
        first_head: number of the first head of the tensors that it is used for.
        rows, block_masks: what has been made of it, by first head, heads and length.
    """

    visible: Visible
    tile: int = 128
    first_head: int = 0
    rows: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=dict, compare=False, repr=False)
    block_masks: dict[tuple[int, int, int], Any] = field(default_factory=dict, compare=False, repr=False)

    def for_heads(self, offset: int) -> "SparseMask":
        """The same for a rank, or a chunk, whose first head is `offset` further."""
        return replace(self, first_head=self.first_head + offset)

    def seen(self, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [heads, queries, keys] for positions [queries] and [keys]."""
        head = torch.arange(self.first_head, self.first_head + heads, device=queries.device)[:, None, None]
        seen = self.visible(head, queries[:, None], keys)
        return seen.expand(heads, len(queries), len(keys))

    def keys_of_rows(self, heads: int, length: int) -> list[Tensor]:
        """For each row of tiles the positions of the keys in those of its tiles where some head sees something."""
        key = self.first_head, heads, length
        if key not in self.rows:
            tiles = torch.arange(length).split(self.tile)
            none = torch.empty(0, dtype=torch.int64)
            self.rows[key] = [
                torch.cat([none, *(keys for keys in tiles if self.seen(heads, queries, keys).any())])
                for queries in tiles
            ]
        return self.rows[key]


def sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    work: Work | None = None,
    *,
    mask: SparseMask,
    scale: float | None = None,
    dropout: AttentionDropout | None = None,
    kept: object | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [S, B, N, H] to those keys of k, v [S, B, G, H] that `mask` shows.

    Args:
        work: the documents to tell apart, if any; the rest of it is not looked at.
        scale: of the scores; 1 / sqrt(H) without it.
    Returns:
        out [S, B, N, H], zero for a query that sees no key, and lse [B, N, S].

    Raises:
        ConfigError: dropout, or a result to keep for a recompute, which it does not have.
    """
    if dropout is not None and dropout.probability > 0:
        raise ConfigError("sparse attention with --attention-dropout", "it has none", "use --attention-dropout 0")
    if kept is not None:
        rule = "sparse attention keeps no result for it"
        raise ConfigError("--recompute-granularity all-but-attention", rule, "use --recompute-granularity full")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cuda":
        return _flex(q, k, v, work, mask, scale, _compiled())
    return _Tiles.apply(q, k, v, mask, _document_of(work, q.shape[0], q.device), scale)


def _document_of(work: Work | None, length: int, device: torch.device) -> Tensor | None:
    """The number of each position's document in each sample, int64 [B, S]."""
    starts: Sequence[Sequence[int]] | None = work.documents if work is not None else None
    if starts is None:
        return None
    positions = torch.arange(length)
    return torch.stack([torch.searchsorted(torch.tensor(row), positions, right=True) for row in starts]).to(device)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, work: Work | None, mask: SparseMask, scale: float, attention: Any
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    block_mask = _block_mask(q, work, mask)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    lse = AuxRequest(lse=True)
    out, aux = attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=grouped, return_aux=lse)
    return out.permute(2, 0, 1, 3), aux.lse.detach()


def _block_mask(q: Tensor, work: Work | None, mask: SparseMask) -> Any:
    """FlexAttention's, made once for the layers of a microbatch."""
    from torch.nn.attention.flex_attention import create_block_mask

    (length, samples, heads, _), first = q.shape, mask.first_head
    of, made = mask.block_masks.get((first, heads, length), (None, None))
    if made is not None and of is work:
        return made
    documents = _document_of(work, length, q.device)

    def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = mask.visible(head + first, query, key)
        return found if documents is None else found & (documents[sample, query] == documents[sample, key])

    rows = None if documents is None else samples
    made = create_block_mask(seen, rows, heads, length, length, q.device, mask.tile)
    mask.block_masks[first, heads, length] = work, made
    return made


@cache
def _compiled() -> Any:
    """FlexAttention is one kernel only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class _Tiles(torch.autograd.Function):
    """The mathematics, row of tiles by row. Saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, documents: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for row, keys, scores in _scores(q, k, mask, documents, scale):
            lse[:, :, row] = scores.logsumexp(-1)
            probabilities = _probabilities(scores, lse[:, :, row])
            out[:, :, row] = (probabilities @ _of_queries(v[:, :, keys], q, scores.dtype)).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.documents, ctx.scale = mask, documents, scale
        ctx.mark_non_differentiable(lse)
        return out.permute(2, 0, 1, 3), lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout, groups = dout.permute(1, 2, 0, 3).to(lse.dtype), q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for row, keys, scores in _scores(q, k, ctx.mask, ctx.documents, ctx.scale):
            probabilities, gradient = _probabilities(scores, lse[:, :, row]), dout[:, :, row]
            dprobabilities = gradient @ _of_queries(v[:, :, keys], q, lse.dtype).transpose(-1, -2)
            mean = (gradient * out[:, :, row]).sum(-1, keepdim=True)
            dscores = (dprobabilities - mean) * probabilities * ctx.scale
            dq[:, :, row] = dscores @ _of_queries(k[:, :, keys], q, lse.dtype)
            dk[:, :, keys] += sum_groups(dscores.transpose(-1, -2) @ q[:, :, row].to(lse.dtype), groups)
            dv[:, :, keys] += sum_groups(probabilities.transpose(-1, -2) @ gradient, groups)
        gradients = (x.to(q.dtype).permute(2, 0, 1, 3) for x in (dq, dk, dv))
        return *gradients, None, None, None


def _scores(q: Tensor, k: Tensor, mask: SparseMask, documents: Tensor | None, scale: float) -> Any:
    """Each row of tiles that sees anything: its columns, the keys' columns, and scores in fp32 or wider."""
    wide, positions = torch.promote_types(q.dtype, torch.float32), torch.arange(q.shape[2], device=q.device)
    for number, columns in enumerate(mask.keys_of_rows(q.shape[1], q.shape[2])):
        if not len(columns):
            continue
        keys, row = columns.to(q.device), slice(number * mask.tile, (number + 1) * mask.tile)
        seen = mask.seen(q.shape[1], positions[row], keys)
        if documents is not None:
            seen = seen & (documents[:, row, None] == documents[:, None, keys])[:, None]
        scores = q[:, :, row].to(wide) @ _of_queries(k[:, :, keys], q, wide).transpose(-1, -2) * scale
        yield row, keys, scores.masked_fill_(~seen, -torch.inf)


def _of_queries(x: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """The kv heads of x [B, G, S, H] once for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Zero throughout a row that sees no key, whose lse is -inf."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
