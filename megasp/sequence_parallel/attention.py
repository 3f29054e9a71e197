"""Attention over a split sequence as the model uses it: Ulysses around a ring, over the positions of a shard map."""

from functools import lru_cache, partial

from torch import Tensor

from megasp.parallel_state import ParallelState
from megasp.sequence_parallel.attend import Kept, attend
from megasp.sequence_parallel.block_kernels import AttentionDropout
from megasp.sequence_parallel.blocks import Mask
from megasp.sequence_parallel.ulysses import UlyssesAttention, head_shares
from megasp.sequence_parallel.work import Documents, Work
from megasp.shard_map import ShardMap

MOST_PARTS = 4
"""Groups of kv heads of the all-gather: more hide more of it, and make smaller kernels."""


class SequenceAttention:
    """Attention whose layers share one `Work` a microbatch.

        attention = SequenceAttention(state, shard_map)
        work = attention.work(length, batch.document_starts)      # once
        out = attention(q, k, v, work)                            # in every layer

    Args:
        state: the rank grid.
        shard_map: positions of the cp ranks; contiguous over them without it, which needs a ring of one rank.
        backend: kernel, "auto" for the best that this machine has.
        comm: how the ring's ranks exchange: p2p, lightseq or all_gather.
        mask: window and sinks.
    """

    def __init__(
        self,
        state: ParallelState,
        shard_map: ShardMap | None = None,
        backend: str = "auto",
        comm: str = "p2p",
        mask: Mask = Mask(),  # noqa: B008 (frozen)
    ) -> None:
        assert shard_map is not None or state.ring.size == 1, "a ring needs a shard map"
        self.state, self.shard_map, self.comm, self.mask = state, shard_map, comm, mask
        self.attention = UlyssesAttention(partial(attend, axis=state.ring, backend=backend), state.ulysses)
        self._one_document = lru_cache(maxsize=8)(self._work)

    def work(self, length: int, heads: int, kv_heads: int, documents: Documents | None = None) -> Work:
        """What there is to compute.

        Args:
            length: tokens of a sample on this rank.
            heads, kv_heads: of this rank, before Ulysses splits them.
            documents: where documents begin in each sample; without it they are not told apart.
        """
        if documents is None:
            return self._one_document(length, heads, kv_heads)
        return self._work(length, heads, kv_heads, documents)

    def _work(self, length: int, heads: int, kv_heads: int, documents: Documents | None = None) -> Work:
        ulysses = self.state.ulysses
        shard_map = self.shard_map or ShardMap.contiguous(length * ulysses.size, ulysses.size)
        parts = head_parts(heads, kv_heads, ulysses.size, ulysses.rank) if self.comm == "all_gather" else 1
        return Work(shard_map.by_ring(ulysses.size), self.mask, documents, self.comm, parts)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        work: Work | None = None,
        dropout: AttentionDropout | None = None,
        kept: Kept | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """q [S, B, N, H], k and v [S, B, G, H] -> [S, B, N, H]; scores times `scale`, 1 / sqrt(H) without it."""
        assert work is not None or self.state.ring.size == 1, "a ring needs to know what is where"
        return self.attention(q, k, v, work=work, dropout=dropout, kept=kept, scale=scale)


def ring_heads(heads: int, kv_heads: int, ulysses: int, rank: int) -> tuple[int, int]:
    """(query heads, kv heads) that the ring sees on Ulysses rank `rank`."""
    share = head_shares(heads, kv_heads, ulysses)[rank]
    queries, kv, _ = share.sizes
    return queries, kv if share.kv_of_queries(heads // kv_heads) is None else queries


def head_parts(heads: int, kv_heads: int, ulysses: int, rank: int) -> int:
    """Groups of kv heads that an all-gather makes: the most that divide them evenly, up to `MOST_PARTS`."""
    _, kv = ring_heads(heads, kv_heads, ulysses, rank)
    return max(parts for parts in range(1, MOST_PARTS + 1) if kv % parts == 0)
