"""The blocks between any two shards are exactly the pairs that see each other, each once, and of the kinds allowed."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from megasp.sequence_parallel.blocks import ANTICAUSAL, CAUSAL, FULL, Block, Mask, blocks
from megasp.shard_map import Ranges, ShardMap


def pairs(block: Block) -> set[tuple[int, int]]:
    """(query position, key position) pairs of a block."""
    queries, keys = block.q[1] - block.q[0], block.k[1] - block.k[0]
    assert queries > 0 and keys > 0 and (block.kind == FULL or queries == keys)
    sees = {FULL: lambda i, j: True, CAUSAL: lambda i, j: j <= i, ANTICAUSAL: lambda i, j: j >= i}[block.kind]
    found = {
        (block.q_position + i, block.k_position + j)
        for i, j in itertools.product(range(queries), range(keys))
        if sees(i, j)
    }
    assert block.pairs == len(found)
    return found


def columns(ranges: Ranges) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


@settings(max_examples=150, deadline=None)
@given(
    ring=st.integers(1, 4),
    each=st.integers(1, 12),
    zigzag=st.booleans(),
    starts=st.sets(st.integers(1, 47), max_size=12),
    window=st.none() | st.integers(0, 50),
    sinks=st.integers(0, 3),
)
def test_blocks_are_the_visible_pairs(
    ring: int, each: int, zigzag: bool, starts: set[int], window: int | None, sinks: int
) -> None:
    length = ring * each
    documents = sorted({0} | {start for start in starts if start < length})
    begin = {i: max(start for start in documents if start <= i) for i in range(length)}
    held = (ShardMap.zigzag if zigzag else ShardMap.contiguous)(length, ring).by_ring(1)
    for queries, keys in itertools.product(held, held):
        found: set[tuple[int, int]] = set()
        for block in blocks(queries, keys, Mask(window, sinks), documents):
            assert columns(queries)[block.q[0]] == block.q_position and columns(keys)[block.k[0]] == block.k_position
            more = pairs(block)
            assert not more & found
            found |= more
        assert found == {
            (i, j)
            for i, j in itertools.product(columns(queries), columns(keys))
            if j <= i and begin[i] == begin[j] and (window is None or i - j <= window or j < begin[j] + sinks)
        }


def test_dense_zigzag_takes_few_blocks() -> None:
    held = ShardMap.zigzag(64, 4).by_ring(1)
    assert [block.kind for block in blocks(held[1], held[1], Mask())] == [CAUSAL, FULL, CAUSAL]
    assert [block.kind for block in blocks(held[1], held[0], Mask())] == [FULL, FULL]
    assert [(block.kind, block.q) for block in blocks(held[1], held[2], Mask())] == [(FULL, (8, 16)), (FULL, (8, 16))]
