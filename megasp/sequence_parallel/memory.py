"""What attention over a split sequence holds, in bytes, as parts of a layer."""

from dataclasses import dataclass

from megasp.config.heads import head_shares
from megasp.footprint import Part, pinned
from megasp.sequence_parallel.attention import head_parts


@dataclass(frozen=True)
class AttentionSizes:
    """One attention on one rank: `tokens` of all its samples, its heads before Ulysses splits them, bytes an element,
    the axes that split the sequence; whether the scores exist, whether some of them are dropped, and whether keys and
    values are repeated for every query head."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    item: int
    samples: int = 1
    ulysses: int = 1
    ulysses_rank: int = 0
    ring: int = 1
    comm: str = "p2p"
    unfused: bool = False
    dropout: bool = False
    repeats_kv: bool = False

    @property
    def qkv(self) -> int:
        return self.tokens * (self.heads + 2 * self.kv_heads) * self.head_dim * self.item


def attention_parts(sizes: AttentionSizes, chunk: Part | None = None) -> list[Part]:
    """From the fused q, k, v to attention's output on the same tokens; `chunk` is attention itself where the tokens are
    one chunk of a sequence."""
    split = Part("q, k, v", None, 0, sizes.qkv, keeps_input=False)  # heads apart: a view, whose gradient is not
    if sizes.ulysses == 1:
        return [split, chunk or _attend(sizes, sizes.tokens, sizes.heads, sizes.kv_heads)]
    share = head_shares(sizes.heads, sizes.kv_heads, sizes.ulysses)[sizes.ulysses_rank]
    queries, kv, _ = share.sizes
    tokens, head = sizes.tokens * sizes.ulysses, sizes.head_dim * sizes.item
    received = tokens * (queries + 2 * kv) * head
    others = (sizes.ulysses - 1) / sizes.ulysses
    copies = 2 * tokens * kv * head if sizes.ulysses > sizes.kv_heads else 0
    exchange = Part(
        "q, k, v of Ulysses", received, received + int(others * sizes.qkv),
        sizes.qkv + int(others * sizes.qkv) + 2 * copies, keeps_input=False,
    )  # fmt: skip
    repeated = share.kv_of_queries(sizes.heads // sizes.kv_heads) is not None
    out = sizes.tokens * sizes.heads * head
    back = Part(
        "attention output", out, out + int(others * out), tokens * queries * head + int(others * out), keeps_input=False
    )
    return [split, exchange, chunk or _attend(sizes, tokens, queries, queries if repeated else kv), back]


@dataclass(frozen=True)
class PastBytes:
    """What the chunks of one attention leave (`chunks.Past`).

    Attributes:
        chunks: how many; `host`: whether it is on the host.
        queries, keys: of a chunk: q, and k with v; `statistics`: its lse.
        wide: times that fp32 is larger than an element.
        scores: what a kernel has more, forward and backward, in which they exist.
    """

    chunks: int
    host: bool
    queries: int
    keys: int
    statistics: int
    wide: int
    scores: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, sizes: AttentionSizes, chunks: int, host: bool) -> "PastBytes":
        """Of `sizes`, one chunk."""
        queries, kv = sizes.heads, sizes.kv_heads
        if sizes.ulysses > 1:
            share = head_shares(sizes.heads, sizes.kv_heads, sizes.ulysses)[sizes.ulysses_rank]
            queries, kv, _ = share.sizes
            kv = kv if share.kv_of_queries(sizes.heads // sizes.kv_heads) is None else queries
        tokens, wide = sizes.tokens * sizes.ulysses, max(4, sizes.item)
        row = tokens * sizes.head_dim * sizes.item
        scores = _beside(sizes, tokens, queries)
        return cls(chunks, host, queries * row, 2 * kv * row, tokens * queries * wide, wide // sizes.item, scores)

    @property
    def kept(self) -> dict[str, int]:
        """By kind, from the forward to the backward. The last chunk's keys are for itself alone."""
        return {
            "keys, values": (self.chunks - 1) * self.keys,
            "attention output": self.chunks * self.queries,
            "statistics": self.chunks * self.statistics,
        }

    @property
    def left(self) -> int:
        """Out and lse of a chunk."""
        return self.queries + self.statistics

    @property
    def on_host(self) -> tuple[int, int]:
        """What the host has of it in pinned memory: kept, and sums of gradients beside."""
        out = self.chunks * (pinned(self.queries) + pinned(self.statistics))
        return out + (self.chunks - 1) * pinned(self.keys), (self.chunks - 1) * pinned(self.keys * self.wide)

    @property
    def staying(self) -> int:
        """Sums of gradients that are there from one chunk's backward to the next one's: of all chunks but the last."""
        return 0 if self.host else (self.chunks - 1) * self.keys * self.wide

    def first(self) -> Part:
        """Attention the first time: over the chunks before, merged."""
        fetched = 2 * self.keys if self.host else self.keys
        merged = self.queries * self.wide + 2 * self.statistics
        block = self.queries * (1 + (self.wide if self.wide > 1 else 0)) + self.statistics
        return Part("attention output", self.queries, fetched + merged + block + self.scores[0], keeps_input=False)

    def again(self, others: int, sums: bool) -> Part:
        """Attention the second time, which takes what was left, and its backward.

        Args:
            others: chunks before it; `sums`: whether there are sums of their gradients already.
        """
        total = self.keys * self.wide
        fetched, summed = 0, 0 if sums else (others + 1) * total
        if self.host:
            # Of keys one is in use and one comes; of sums one goes meanwhile, and there is the chunk's own.
            fetched, summed = min(others, 2) * self.keys, (1 + min(others, 2 + sums)) * total
        gradients = self.queries * (1 + self.wide) + self.keys
        return Part(
            "attention output", self.queries, self.left, summed + gradients + fetched + self.scores[1],
            {"statistics": self.statistics}, keeps_output=True,
        )  # fmt: skip


def _attend(sizes: AttentionSizes, tokens: int, heads: int, kv_heads: int) -> Part:
    """Attention of `tokens` tokens with the heads that this rank computes."""
    wide = max(4, sizes.item)
    q, kv = (tokens * n * sizes.head_dim * sizes.item for n in (heads, 2 * kv_heads))
    lse = tokens * heads * wide
    kept, forward, backward = {"statistics": lse}, q + lse, q + kv + lse
    more = _beside(sizes, tokens, heads)
    forward, backward = forward + more[0], backward + more[1]
    if sizes.ring > 1:
        # Partial sums are wide. Of keys and values there are those that travel, those in use, and a copy of one's own.
        wide_q, wide_kv = q // sizes.item * wide, kv // sizes.item * wide
        parts = head_parts(sizes.heads, sizes.kv_heads, sizes.ulysses, sizes.ulysses_rank)
        some = parts if sizes.comm == "all_gather" else 1
        travelling = {"p2p": 3, "lightseq": 3, "all_gather": 1 + 2 * (sizes.ring - 1)}[sizes.comm] * kv // some
        halves = 1 if sizes.comm == "lightseq" else 2  # of a shard, zigzag, of which a block has one
        block = (q + wide_q) // halves // some
        beside = more if sizes.unfused else (more[0] // halves // some, more[1] // halves // some)
        forward = wide_q + 2 * lse + travelling + max(block, q) + beside[0]
        moved = 2 * (2 * q + lse) if sizes.comm == "lightseq" else 0
        # Sums of one's own keys and of those in use, one that comes, and on a longer ring one that goes.
        sums = 3 + (sizes.ring > 2 and sizes.comm == "p2p")
        backward = wide_q + sums * wide_kv + travelling + (q + kv) // 2 + moved + beside[1]
    return Part("attention output", q, forward, backward, kept, keeps_output=True)


def _beside(sizes: AttentionSizes, tokens: int, heads: int) -> tuple[int, int]:
    """What a kernel has more, forward and backward, in which the scores exist, or keys and values of every head."""
    if sizes.repeats_kv:
        both = 2 * tokens * heads * sizes.head_dim * sizes.item
        return both, 2 * both
    if not sizes.unfused:
        return 0, 0
    # In matrices of scores: forward they and the probabilities, backward probabilities and two of gradients; with
    # dropout its factors, and what they are made of, three times 64 bits. All else is copied wide.
    wide = max(4, sizes.item)
    # Of a ring's blocks, p2p's largest has half of the queries; the all-gather's part of the heads, against counts.
    blocks = {"lightseq": 1, "p2p": 2, "all_gather": 8}[sizes.comm] if sizes.ring > 1 else 1
    matrix = tokens * heads * (tokens // sizes.samples) * wide // blocks
    mixing = 24 * matrix // wide if sizes.dropout else 0
    copies = 8 * tokens * heads * sizes.head_dim * wide
    return 2 * matrix + mixing + copies // 2, max((3 + 2 * sizes.dropout) * matrix, matrix + mixing) + copies
