"""The shard map: every position belongs to one rank, all hold equally many, and zigzag balances causal work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.shard_map import ShardMap


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_contiguous_is_numpys_split(ranks: int) -> None:
    tokens = np.arange(24).reshape(2, 12) * 7
    shard_map = ShardMap.contiguous(12, ranks)
    assert (shard_map.ranks, shard_map.length) == (ranks, 12 // ranks)
    for rank, expected in enumerate(np.split(tokens, ranks, -1)):
        assert np.array_equal(shard_map.take(rank, tokens), expected)
        assert np.array_equal(shard_map.take(rank, np.arange(12)), shard_map.positions(rank))
    assert shard_map.positions(0).dtype == np.int64


def test_must_divide() -> None:
    with pytest.raises(AssertionError):
        ShardMap.contiguous(10, 4)


@given(ring=st.integers(1, 6), ulysses=st.integers(1, 5), each=st.integers(1, 9))
def test_zigzag_is_a_partition(ring: int, ulysses: int, each: int) -> None:
    length = ring * ulysses * each
    shards = ShardMap.zigzag(length, ring, ulysses)
    held = [shards.positions(rank) for rank in range(shards.ranks)]
    assert sorted(np.concatenate(held)) == list(range(length)) and {len(p) for p in held} == {each}
    for number, ranges in enumerate(shards.by_ring(ulysses)):
        together = np.concatenate([held[rank] for rank in range(number * ulysses, (number + 1) * ulysses)])
        np.testing.assert_array_equal(np.concatenate([np.arange(*r) for r in ranges]), together)


def test_ranges() -> None:
    assert ShardMap.zigzag(16, 2, 2).ranges == (((0, 4),), ((12, 16),), ((4, 8),), ((8, 12),))
    assert ShardMap.zigzag(16, 4).ranges[3] == ((6, 10),)
    assert ShardMap.zigzag(12, 2, 3).by_ring(3) == (((0, 3), (9, 12)), ((3, 9),))
    assert ShardMap.zigzag(8, 1, 2).ranges == ShardMap.contiguous(8, 2).ranges


def test_zigzag_balances_causal_work() -> None:
    shards = ShardMap.zigzag(64, 4)
    assert len({int(sum(shards.positions(rank) + 1)) for rank in range(4)}) == 1
    sequence = np.arange(64) * 10
    np.testing.assert_array_equal(shards.take(2, sequence), shards.positions(2) * 10)
