"""Which heads each Ulysses rank holds, and in which chunks they travel. Pure numbers; the one rule.

Rank u of U holds query heads [u N // U, (u + 1) N // U) and those kv heads that they use; a kv head goes to every rank
that uses it.

    7 query heads, 7 kv heads, 4 ranks     q 0 | 1 2 | 3 4 | 5 6         kv the same
    8 query heads, 2 kv heads, 4 ranks     q 0 1 | 2 3 | 4 5 | 6 7       kv 0 | 0 | 1 | 1
    6 query heads, 2 kv heads, 4 ranks     q 0 | 1 2 | 3 | 4 5           kv 0 | 0 | 1 | 1

A rank's heads may be exchanged in chunks. They are cut between kv heads where every rank has a kv head for each chunk,
and between query heads otherwise; a kv head that several chunks use comes with the first of them.

    8 query heads, 4 kv heads, 2 ranks, 2 chunks      rank 0: q 0 1 with kv 0, then q 2 3 with kv 1
    8 query heads, 2 kv heads, 2 ranks, 2 chunks      rank 0: q 0 1 with kv 0, then q 2 3 (kv 0 is there)
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


@dataclass(frozen=True)
class HeadShare:
    """Heads of one rank, or of one of its chunks: query heads [q0, q1), which use kv heads [k0, k1).

    Of these [new, k1) come with the chunk; those before came with an earlier one.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    new: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Heads of q, k and v that travel; of q alone where no kv head does."""
        kv = self.k1 - self.new
        return (self.q1 - self.q0, kv, kv) if kv else (self.q1 - self.q0,)

    def kv_of_queries(self, group: int) -> list[int] | None:
        """The local kv head of each local query head; None where equal groups of queries share them in order.

        Args:
            group: query heads that share a kv head, over all ranks.
        """
        of_each = [head // group - self.k0 for head in range(self.q0, self.q1)]
        queries, kv = self.q1 - self.q0, self.k1 - self.k0
        even = queries % kv == 0 and of_each == [head * kv // queries for head in range(queries)]
        return None if even else of_each


@lru_cache
def head_shares(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """The heads of every rank; at least one query head each."""
    assert heads >= ranks and heads % kv_heads == 0, (heads, kv_heads, ranks)
    group = heads // kv_heads
    bounds = [rank * heads // ranks for rank in range(ranks + 1)]
    return tuple(HeadShare(a, b, a // group, (b - 1) // group + 1, a // group) for a, b in pairwise(bounds))


@lru_cache
def head_chunks(heads: int, kv_heads: int, ranks: int, chunks: int) -> tuple[tuple[HeadShare, ...], ...]:
    """The chunks of every rank, first index the rank; at most as many as `most_chunks` says."""
    shares, group = head_shares(heads, kv_heads, ranks), heads // kv_heads
    between_kv = chunks <= most_chunks(heads, kv_heads, ranks, between_kv=True)
    return tuple(_cut(share, group, chunks, between_kv) for share in shares)


def _cut(share: HeadShare, group: int, chunks: int, between_kv: bool) -> tuple[HeadShare, ...]:
    first, count = (share.k0, share.k1 - share.k0) if between_kv else (share.q0, share.q1 - share.q0)
    cuts = [(first + chunk * count // chunks) * (group if between_kv else 1) for chunk in range(1, chunks)]
    arrived, found = share.k0, []
    for q0, q1 in pairwise([share.q0, *cuts, share.q1]):
        k1 = (q1 - 1) // group + 1
        found.append(HeadShare(q0, q1, q0 // group, k1, arrived))
        arrived = k1
    return tuple(found)


def most_chunks(heads: int, kv_heads: int, ranks: int, between_kv: bool) -> int:
    """The most chunks that each have a query head on every rank; or a kv head that no other chunk uses."""
    sizes = ((share.k1 - share.k0, share.q1 - share.q0) for share in head_shares(heads, kv_heads, ranks))
    return min(kv if between_kv else queries for kv, queries in sizes)
