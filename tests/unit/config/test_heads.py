"""The rule of which rank holds which heads: everything is somewhere once, chunks included."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.config.heads import head_chunks, head_shares, most_chunks


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "queries", "kv"),
    [
        (7, 7, 4, [[0], [1, 2], [3, 4], [5, 6]], [[0], [1, 2], [3, 4], [5, 6]]),
        (8, 2, 4, [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [0], [1], [1]]),
        (6, 2, 4, [[0], [1, 2], [3], [4, 5]], [[0], [0], [1], [1]]),
    ],
)
def test_the_rule_as_it_is_written(heads: int, kv_heads: int, ranks: int, queries: list, kv: list) -> None:
    shares = head_shares(heads, kv_heads, ranks)
    assert [list(range(share.q0, share.q1)) for share in shares] == queries
    assert [list(range(share.k0, share.k1)) for share in shares] == kv


@given(data=st.data(), group=st.integers(1, 6), kv_heads=st.integers(1, 8))
def test_chunks_of_a_rank_are_its_share(data: st.DataObject, group: int, kv_heads: int) -> None:
    heads = group * kv_heads
    ranks = data.draw(st.integers(1, heads))
    chunks = data.draw(st.integers(1, most_chunks(heads, kv_heads, ranks, between_kv=False)))
    between_kv = chunks <= most_chunks(heads, kv_heads, ranks, between_kv=True)
    for share, parts in zip(
        head_shares(heads, kv_heads, ranks), head_chunks(heads, kv_heads, ranks, chunks), strict=True
    ):
        assert len(parts) == chunks and parts[0].q0 == share.q0 and parts[-1].q1 == share.q1
        assert all(a.q1 == b.q0 and a.k1 == b.new for a, b in pairwise(parts))
        sent = [kv for part in parts for kv in range(part.new, part.k1)]
        assert sent == list(range(share.k0, share.k1)), "each kv head comes once"
        for part in parts:
            assert part.q0 < part.q1 and part.k0 <= part.new <= part.k1
            assert (part.k0 == part.new) or not between_kv, "kv heads are whole where they can be"
            of_each = part.kv_of_queries(group) or [
                i * (part.k1 - part.k0) // (part.q1 - part.q0) for i in range(part.q1 - part.q0)
            ]
            assert [part.k0 + kv for kv in of_each] == [head // group for head in range(part.q0, part.q1)]
