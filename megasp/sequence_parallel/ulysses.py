"""DeepSpeed-Ulysses (arXiv 2309.14509): attention over a split sequence by exchanging it for a split of the heads.

    before            all-to-all           attention             all-to-all          after
    rank 0  s0 | all heads     ->   all of s | heads 0..N/U   ->   s0 | all heads
    rank 1  s1 | all heads     ->   all of s | heads N/U..    ->   s1 | all heads

Any number of heads from one per rank up works; `megasp.config.heads` says which rank holds which. The gradients of a kv
head that went to several ranks are summed on return.

q, k and v travel in one exchange and the output in another, so a layer makes two all-to-alls forward and two backward.
Sent per rank and direction with even heads, f = (U - 1) / U, c local tokens, r copies of each kv head:
f c b (2 dq + 2 r dkv) elements.

In chunks of the heads an exchange travels while the chunk before is computed; C chunks send the same bytes in 2 C
all-to-alls a direction. Autograd runs this backwards, the last chunk first, so there it overlaps as well:

    forward     exchange 0 | 1           | 2           |             |           backward: from right to left
    attention              | 0           | 1           | 2           |
    output                 |             | 0           | 1           | 2
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megasp.collectives import PendingExchange, start_all_to_all
from megasp.config.heads import HeadShare, head_chunks
from megasp.parallel_state import Axis

LocalAttention = Callable[..., tuple[Tensor, Any]]

Chunk = tuple[HeadShare, ...]
"""The heads of every rank in one chunk."""


class _Exchanges:
    """The exchanges of one attention: what is on its way, and the tensors that all chunks fill together."""

    def __init__(self, axis: Axis, chunks: Sequence[Chunk]) -> None:
        self.axis, self.chunks = axis, chunks
        self.pending: dict[int, PendingExchange] = {}
        self.output: Tensor | None = None
        self.arriving: dict[int, Tensor] = {}  # gradients of chunks of the output
        self.gradients: tuple[Tensor, ...] = ()  # of q, k and v
        self.copies: list[tuple[HeadShare, Tensor, Tensor]] = []  # those of k and v heads that went to several ranks
        shares = [share for chunk in chunks for share in chunk]
        self.heads = max(share.q1 for share in shares)
        self.copied = sum(share.k1 - share.new for share in shares) > max(share.k1 for share in shares)

    def start(self, chunk: int, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        self.pending[chunk] = start_all_to_all(sends, receives, self.axis)

    def wait(self, chunk: int) -> None:
        self.pending.pop(chunk).wait()

    def room(self, x: Tensor, heads: int) -> Tensor:
        """For some heads of the positions of every rank, where x is [S, B, ..., H]: [U S, B, heads, H]."""
        return x.new_empty(self.axis.size * x.shape[0], x.shape[1], heads, x.shape[3])

    def by_rank(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Views of every rank's positions of [U S, ...]."""
        return list(zip(*(x.chunk(self.axis.size) for x in tensors), strict=True))


def _heads_of(share: HeadShare, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Views of those heads of [S, B, all heads, H] that travel with a share."""
    views = q[:, :, share.q0 : share.q1], k[:, :, share.new : share.k1], v[:, :, share.new : share.k1]
    return views[: len(share.sizes)]


class _Depart(torch.autograd.Function):
    """A chunk of q [S, B, N, H], k and v [S, B, G, H] sets off: q, k, v for the next chunk, and what `_Arrive` waits
    for, [U S, B, heads, H] each. In the backward its gradients are here, and with the first chunk's all of them."""

    @staticmethod
    def forward(ctx: Any, exchanges: _Exchanges, chunk: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.exchanges, ctx.chunk = exchanges, chunk
        ctx.set_materialize_grads(False)
        shares = exchanges.chunks[chunk]
        sizes = shares[exchanges.axis.rank].sizes
        arriving = [exchanges.room(x, heads) for x, heads in zip((q, k, v), sizes, strict=False)]
        exchanges.start(chunk, [_heads_of(share, q, k, v) for share in shares], exchanges.by_rank(arriving))
        return q, k, v, *arriving

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        exchanges = ctx.exchanges
        exchanges.wait(ctx.chunk)
        if ctx.chunk > 0:
            return (None,) * 5
        dq, dk, dv = exchanges.gradients
        if exchanges.copied:
            dk, dv = (_sum_copies([(copy[0], copy[1 + index]) for copy in exchanges.copies], dk) for index in (0, 1))
        exchanges.gradients, exchanges.copies = (), []
        return None, None, dq, dk, dv


class _Arrive(torch.autograd.Function):
    """A chunk is here. In the backward its gradients set off."""

    @staticmethod
    def forward(
        ctx: Any, exchanges: _Exchanges, chunk: int, shapes: Sequence[torch.Size], *arriving: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchanges, ctx.chunk, ctx.shapes = exchanges, chunk, shapes
        exchanges.wait(chunk)
        return tuple(x.view_as(x) for x in arriving)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchanges, shares = ctx.exchanges, ctx.exchanges.chunks[ctx.chunk]
        if not exchanges.gradients:
            exchanges.gradients = tuple(gradients[0].new_empty(shape) for shape in ctx.shapes)
        places = [_heads_of(share, *exchanges.gradients) for share in shares]
        if exchanges.copied:  # places overlap, so each copy's gradient comes to one of its own
            places = [(q, *(torch.empty_like(x) for x in kv)) for q, *kv in places]
            exchanges.copies += [(share, *kv) for share, (_, *kv) in zip(shares, places, strict=True) if kv]
        exchanges.start(ctx.chunk, exchanges.by_rank(gradients), places)
        return None, None, None, *gradients


def _sum_copies(copies: Sequence[tuple[HeadShare, Tensor]], like: Tensor) -> Tensor:
    """The gradient of all kv heads from those of every rank's copies, summed in fp32 or wider."""
    total = like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
    for share, copy in copies:
        total[:, :, share.new : share.k1] += copy
    return total.to(like.dtype)


class _Return(torch.autograd.Function):
    """The output of a chunk, [U S, B, heads, H], sets off: nothing that `_Collect` waits for."""

    @staticmethod
    def forward(ctx: Any, exchanges: _Exchanges, chunk: int, x: Tensor) -> Tensor:
        ctx.exchanges, ctx.chunk = exchanges, chunk
        if exchanges.output is None:
            exchanges.output = x.new_empty(x.shape[0] // exchanges.axis.size, x.shape[1], exchanges.heads, x.shape[3])
        places = [(exchanges.output[:, :, share.q0 : share.q1],) for share in exchanges.chunks[chunk]]
        exchanges.start(chunk, exchanges.by_rank([x]), places)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, Tensor]:
        ctx.exchanges.wait(ctx.chunk)
        return None, None, ctx.exchanges.arriving.pop(ctx.chunk)


class _Collect(torch.autograd.Function):
    """The output of all chunks, [S, B, N, H]. In the backward its gradient sets off, the last chunk's first."""

    @staticmethod
    def forward(ctx: Any, exchanges: _Exchanges, *returned: Tensor) -> Tensor:
        ctx.exchanges = exchanges
        for chunk in range(len(exchanges.chunks)):
            exchanges.wait(chunk)
        out, exchanges.output = exchanges.output, None
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        exchanges = ctx.exchanges
        for chunk, shares in reversed(list(enumerate(exchanges.chunks))):
            mine = shares[exchanges.axis.rank]
            arriving = exchanges.arriving[chunk] = exchanges.room(dout, mine.q1 - mine.q0)
            sends = [(dout[:, :, share.q0 : share.q1],) for share in shares]
            exchanges.start(chunk, sends, exchanges.by_rank([arriving]))
        return None, *(dout.new_empty(0) for _ in exchanges.chunks)


class _LastHead(torch.autograd.Function):
    """x [S, B, heads, H], and its last head for each of some later chunks. Gradients are summed in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, users: int) -> tuple[Tensor, ...]:
        return x.view_as(x), *(x[:, :, -1:].view_as(x[:, :, -1:]) for _ in range(users))

    @staticmethod
    def backward(ctx: Any, dx: Tensor, *of_users: Tensor) -> tuple[Tensor, None]:
        total = dx.to(torch.promote_types(dx.dtype, torch.float32), copy=True)
        for gradient in of_users:
            total[:, :, -1:] += gradient
        return total.to(dx.dtype), None


class UlyssesAttention(nn.Module):
    """Wraps any attention over a whole sequence, or over a ring's shard of it, so that it runs split over `axis`, too.

    Args:
        attention: function (q, k, v, **options) -> (out, anything) such as `attend`. It is called for some of the
            heads: options that have a method `for_heads(first head)` or `for_chunk(number)` are asked for theirs.
        axis: the Ulysses axis, of U ranks; at most the query heads N of this rank.
        chunks: groups of heads that are exchanged one after another, so that each travels while the one before is
            computed; `megasp.config.heads` says how many there can be.

    Forward: q [S, B, N, H], k and v [S, B, G, H], this rank's S positions in rank order -> [S, B, N, H].

    Example:
        attention = UlyssesAttention(attend, state.ulysses)
        out = attention(q, k, v, causal=True)                   # [S, B, N, H], as q
    """

    def __init__(self, attention: LocalAttention, axis: Axis, chunks: int = 1) -> None:
        super().__init__()
        self.attention, self.axis, self.chunks = attention, axis, chunks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.axis.size == 1:
            return self.attention(q, k, v, **options)[0]
        heads, kv_heads = q.shape[2], k.shape[2]
        by_rank = head_chunks(heads, kv_heads, self.axis.size, self.chunks)
        mine, exchanges = by_rank[self.axis.rank], _Exchanges(self.axis, list(zip(*by_rank, strict=True)))
        shapes = [x.shape for x in (q, k, v)]
        q, k, v, *arriving = _Depart.apply(exchanges, 0, q, k, v)
        kept: list[list[Tensor]] = [[], []]  # kv heads of k and of v that later chunks use, too
        returned = []
        for chunk, share in enumerate(mine):
            coming = arriving
            if chunk + 1 < len(mine):
                q, k, v, *arriving = _Depart.apply(exchanges, chunk + 1, q, k, v)
            queries, *kv = _Arrive.apply(exchanges, chunk, shapes, *coming)
            keys, values = _with_kept(kv, kept, mine, chunk)
            of_each = share.kv_of_queries(heads // kv_heads)
            if of_each is not None:
                keys, values = keys[:, :, of_each], values[:, :, of_each]
            out, _ = self.attention(queries, keys, values, **_of_chunk(options, share, chunk))
            returned.append(_Return.apply(exchanges, chunk, out))
        return _Collect.apply(exchanges, *returned)


def _with_kept(arrived: list[Tensor], kept: list[list[Tensor]], mine: Chunk, chunk: int) -> list[Tensor]:
    """k and v of a chunk from what has arrived with it, and the head that came before where it uses one.

    Args:
        arrived: k and v, or nothing.
        kept: for k and for v the copies of the last head that later chunks take; filled here.
    """
    share = mine[chunk]
    before = [[copies.pop()] if share.k0 < share.new else [] for copies in kept]
    if arrived:
        users = sum(later.k0 < share.k1 for later in mine[chunk + 1 :])
        both = [_LastHead.apply(x, users) if users else (x,) for x in arrived]
        kept[:] = [list(copies) for _, *copies in both]
        arrived = [x for x, *_ in both]
    parts = [[*old, *new] for old, new in zip(before, ([x] for x in arrived) if arrived else ([], []), strict=True)]
    return [torch.cat(tensors, 2) if len(tensors) > 1 else tensors[0] for tensors in parts]


def _of_chunk(options: dict[str, Any], share: HeadShare, chunk: int) -> dict[str, Any]:
    """The options for these heads, which the local attention counts from 0."""
    found = dict(options)
    for name, value in options.items():
        if hasattr(value, "for_heads"):
            found[name] = value.for_heads(share.q0)
        elif hasattr(value, "for_chunk"):
            found[name] = value.for_chunk(chunk)
    return found
