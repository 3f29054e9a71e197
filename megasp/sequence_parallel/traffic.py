"""What attention over a split sequence sends, in closed form: bytes and messages of a rank, a layer, a microbatch.

Every message and exchange is priced by the shapes and dtypes of what is in it (lse and sums in fp32, copied kv heads,
uneven heads); skipped blocks cost nothing. For dense causal attention with even heads, B bytes an element, c local
tokens, and the gradients' sums counted in B, too, this is the table of the field:

    Ulysses        forward f c b (2 dq + 2 dkv) B                     backward the same         f = (U - 1) / U
    ring           forward (R - 1) c b 2 dkv B                        backward twice that
    all-gather     the same as the ring
    LightSeq       forward c b B [2 (3R/8 - 1/4) dkv + 2 (R/8 - 1/4) dq] on average, R even, and
                   lse; backward twice that
"""

from dataclasses import dataclass

import torch

from megasp.config.heads import head_chunks
from megasp.parallel_state import Traffic
from megasp.sequence_parallel.attention import ring_heads
from megasp.sequence_parallel.schedules import DKV, DQ, KV, OUT, Q
from megasp.sequence_parallel.work import Work


@dataclass(frozen=True)
class AttentionShape:
    """One attention on one rank: S tokens, B samples, N query and G kv heads of size H, before Ulysses splits them."""

    tokens: int
    samples: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of an element of lse and of the sums."""
        return torch.promote_types(self.dtype, torch.float32).itemsize


def ring_traffic(
    shape: AttentionShape, work: Work, ulysses: int, ulysses_rank: int, rank: int, chunks: int = 1
) -> tuple[Traffic, Traffic]:
    """(forward, backward) over the ring axis of the ring rank `rank`; Ulysses' chunks are a ring attention each."""
    directions = Traffic(), Traffic()
    for heads, kv_heads in ring_heads(shape.heads, shape.kv_heads, ulysses, ulysses_rank, chunks):
        rows = shape.tokens * ulysses * shape.samples
        kv = rows * kv_heads // work.schedule.parts * shape.head_dim
        q = rows * heads * shape.head_dim
        lse = rows * heads * shape.wide
        sizes = {KV: 2 * kv * shape.item, DKV: 2 * kv * shape.wide, DQ: q * shape.wide}
        forward = sizes | {Q: q * shape.item, OUT: q * shape.item + lse}
        backward = sizes | {Q: 3 * q * shape.item + lse}  # with the output and its gradient
        for direction, steps, size in zip(directions, work.schedule[:2], (forward, backward), strict=True):
            for message in (m for step in steps for m in step.messages if m.source == rank):
                direction.add("send", size[message.what])
    return directions


def ulysses_traffic(shape: AttentionShape, ulysses: int, rank: int, chunks: int = 1) -> tuple[Traffic, Traffic]:
    """(forward, backward) over the Ulysses axis of the Ulysses rank `rank`: two exchanges a chunk in each."""
    forward, backward = Traffic(), Traffic()
    if ulysses == 1:
        return forward, backward
    per_head = shape.tokens * shape.samples * shape.head_dim * shape.item
    for shares in zip(*head_chunks(shape.heads, shape.kv_heads, ulysses, chunks), strict=True):
        others = [share for other, share in enumerate(shares) if other != rank]
        mine = shares[rank].sizes
        forward.add("all_to_all", sum(sum(share.sizes) for share in others) * per_head)  # q, k, v to their heads' ranks
        forward.add("all_to_all", len(others) * mine[0] * per_head)  # my heads' output to its tokens' ranks
        backward.add("all_to_all", sum(share.sizes[0] for share in others) * per_head)
        backward.add("all_to_all", len(others) * sum(mine) * per_head)
    return forward, backward
