"""The shard map: every position belongs to one rank, and a shard is numpy's split."""

import numpy as np
import pytest

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


def test_several_ranges_keep_their_order() -> None:
    """As a zigzag map will: rank 0 has the first and the last quarter."""
    zigzag = ShardMap(8, (((0, 2), (6, 8)), ((2, 4), (4, 6))))
    assert zigzag.positions(0).tolist() == [0, 1, 6, 7] and zigzag.length == 4
    assert zigzag.take(0, np.arange(16).reshape(2, 8)).tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]


def test_must_divide() -> None:
    with pytest.raises(AssertionError):
        ShardMap.contiguous(10, 4)
