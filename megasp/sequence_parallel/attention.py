"""Attention over a split sequence as the model uses it: Ulysses around a ring, over positions that shards say."""

import math
from functools import partial

from torch import Tensor

from megasp.config.heads import head_chunks
from megasp.errors import ConfigError
from megasp.host_copies import Copier
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel.attend import Kept, attend
from megasp.sequence_parallel.block_kernels import AttentionDropout
from megasp.sequence_parallel.blocks import Mask
from megasp.sequence_parallel.chunks import Chunk, Past
from megasp.sequence_parallel.shards import Shards
from megasp.sequence_parallel.sparse import SparseMask, sparse_attend
from megasp.sequence_parallel.ulysses import UlyssesAttention
from megasp.sequence_parallel.work import Documents, Work
from megasp.shard_map import ShardMap

MOST_PARTS = 4
"""Groups of kv heads of the all-gather: more hide more of it, and make smaller kernels."""


class SequenceAttention:
    """Attention whose layers share one `Work` a microbatch.

        attention = SequenceAttention(state, shards)
        work = attention.work(length, batch.document_starts)      # once
        out = attention(q, k, v, work)                            # in every layer

    Args:
        state: the rank grid.
        shards: positions of the cp ranks; contiguous over them without it, which needs a ring of one rank.
        backend: kernel, "auto" for the best that this machine has.
        comm: how the ring's ranks exchange: p2p, lightseq or all_gather.
        mask: window and sinks.
        chunks: groups of heads that Ulysses exchanges one after another.
        sparse: what a query sees, instead of what is before it; with a ring of one rank.
        sequence_chunks: chunks of the sequence that are attended to one after another (`Chunk`); with a ring of one
            rank, and shards that are made for them (`ShardMap.chunked`).
        copies: how keys and values of chunks get to the host; without it they stay on the device.

    Raises:
        ConfigError: a sparse mask with a ring, a window or a kernel of its own.
    """

    def __init__(
        self,
        state: ParallelState,
        shards: Shards | None = None,
        backend: str = "auto",
        comm: str = "p2p",
        mask: Mask = Mask(),  # noqa: B008 (frozen)
        chunks: int = 1,
        sparse: SparseMask | None = None,
        sequence_chunks: int = 1,
        copies: Copier | None = None,
    ) -> None:
        assert shards is not None or state.ring.size == 1, "a ring needs to know who holds what"
        assert sequence_chunks == 1 or state.ring.size == 1, "a ring's ranks hold other positions"
        self.sequence_chunks, self.copies = sequence_chunks, copies
        self.state, self.shards, self.comm, self.mask = state, shards, comm, mask
        self.sparse = sparse
        local = partial(attend, axis=state.ring, backend=backend) if sparse is None else sparse_attend
        if sparse is not None:
            _check_sparse(state.ring.size, mask, backend)
        self.attention = UlyssesAttention(local, state.ulysses, chunks)
        self._one_document: dict[tuple[int, int, int], Work] = {}

    def work(self, length: int, heads: int, kv_heads: int, documents: Documents | None = None) -> Work:
        """What there is to compute.

        Args:
            length: tokens of a sample on this rank.
            heads, kv_heads: of this rank, before Ulysses splits them.
            documents: where documents begin in each sample; without it they are not told apart.
        """
        if documents is not None:
            return self._work(length, heads, kv_heads, documents)
        key = length, heads, kv_heads
        if key not in self._one_document:
            self._one_document[key] = self._work(*key)
        return self._one_document[key]

    def _work(self, length: int, heads: int, kv_heads: int, documents: Documents | None = None) -> Work:
        ulysses = self.state.ulysses
        if self.sequence_chunks > 1:
            each = length * ulysses.size // self.sequence_chunks
            chunks = (((number * each, (number + 1) * each),) for number in range(self.sequence_chunks))
            return Work(tuple(chunks), self.mask, documents)
        held = (self.shards or ShardMap.contiguous(length * ulysses.size, ulysses.size)).of(documents)
        mine = heads, kv_heads, ulysses.size, ulysses.rank, self.attention.chunks
        parts = head_parts(*mine) if self.comm == "all_gather" else 1
        return Work(held.by_ring(ulysses.size), self.mask, documents, self.comm, parts)

    def past(self) -> Past:
        """Where the chunks of one layer's sequence leave what those after them see."""
        return Past(self.copies)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        work: Work | Chunk | None = None,
        dropout: AttentionDropout | None = None,
        kept: Kept | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """q [S, B, N, H], k and v [S, B, G, H] -> [S, B, N, H]; scores times `scale`, 1 / sqrt(H) without it."""
        assert work is not None or self.state.ring.size == 1, "a ring needs to know what is where"
        sparse = {} if self.sparse is None else {"mask": self.sparse}
        return self.attention(q, k, v, work=work, dropout=dropout, kept=kept, scale=scale, **sparse)


def _check_sparse(ring: int, mask: Mask, backend: str) -> None:
    if ring > 1:
        rule = "a ring's blocks have causal masks or none"
        raise ConfigError(f"sparse attention with ring-size {ring}", rule, "use --ulysses-size instead")
    if mask != Mask():
        raise ConfigError("sparse attention with --window-size", "its function says all", "put the window into it")
    if backend != "auto":
        raise ConfigError(
            f"sparse attention with --attention-backend {backend}", "it has kernels of its own", "leave it out"
        )


def ring_heads(heads: int, kv_heads: int, ulysses: int, rank: int, chunks: int = 1) -> list[tuple[int, int]]:
    """(query heads, kv heads) that the ring sees on Ulysses rank `rank`, for each chunk."""
    shares = head_chunks(heads, kv_heads, ulysses, chunks if ulysses > 1 else 1)[rank]
    found = [(share.q1 - share.q0, share.k1 - share.k0, share.kv_of_queries(heads // kv_heads)) for share in shares]
    return [(queries, kv if of_each is None else queries) for queries, kv, of_each in found]


def head_parts(heads: int, kv_heads: int, ulysses: int, rank: int, chunks: int = 1) -> int:
    """Groups of kv heads that an all-gather makes: the most that divide those of every chunk, up to `MOST_PARTS`."""
    seen = math.gcd(*(kv for _, kv in ring_heads(heads, kv_heads, ulysses, rank, chunks)))
    return max(parts for parts in range(1, MOST_PARTS + 1) if seen % parts == 0)
