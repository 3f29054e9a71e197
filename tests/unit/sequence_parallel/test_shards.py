"""Who holds what is chosen by the documents' attention work, and the choice is a function of them alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.sequence_parallel import Mask, Work
from megasp.sequence_parallel.schedules import simulate
from megasp.sequence_parallel.shards import shards, work_of_parts
from megasp.shard_map import ShardMap


def documents(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])


def time_of(held: ShardMap, ulysses: int, starts: list[np.ndarray], comm: str = "p2p") -> float:
    work = Work(held.by_ring(ulysses), documents=starts, comm=comm)
    return simulate(work.schedule.forward, len(work.held), work.pairs)[0]


@given(starts=st.sets(st.integers(1, 47), max_size=12), window=st.none() | st.integers(0, 50), sinks=st.integers(0, 3))
def test_work_is_the_number_of_pairs(starts: set[int], window: int | None, sinks: int) -> None:
    begin, mask = np.array(sorted({0, *starts})), Mask(window, sinks)
    for parts in (1, 4, 48):
        each = 48 // parts
        held = tuple(((part * each, (part + 1) * each),) for part in range(parts))
        work = Work(held, mask, [begin])
        want = [sum(b.pairs for k in range(parts) for b in work.blocks(q, k)) for q in range(parts)]
        assert work_of_parts(48, parts, mask, [begin]) == want
    assert work_of_parts(48, 4, mask, [begin, begin]) == [2 * pairs for pairs in work_of_parts(48, 4, mask, [begin])]


def test_one_document_is_zigzag() -> None:
    held = shards(64, 4, 2)
    assert held.of(None) == held.of([np.array([0])]) == ShardMap.zigzag(64, 4, 2)
    parts = work_of_parts(64, 8, Mask(), [np.array([0])])
    assert sorted(ShardMap.balanced(64, 4, 1, parts).by_ring(1)) == sorted(ShardMap.zigzag(64, 4).by_ring(1))


def test_short_documents_stay_where_they_are() -> None:
    held, short = shards(64, 4, 1), [np.arange(0, 64, 4)]
    assert held.of(short) == ShardMap.contiguous(64, 4)
    assert not any(step.messages for step in Work(held.of(short).by_ring(1), documents=short).schedule.forward)


@pytest.mark.parametrize("comm", ["p2p", "lightseq", "all_gather"])
@pytest.mark.parametrize("starts", [documents(192, 320, 256, 256), documents(700, *[12] * 27)])
def test_long_documents_are_dealt_by_their_work(starts: np.ndarray, comm: str) -> None:
    held = shards(1024, 4, 2, comm)
    plain = ShardMap.zigzag(1024, 4, 2), ShardMap.contiguous(1024, 8)
    chosen, *others = (time_of(each, 2, [starts], comm) for each in (held.of([starts]), *plain))
    assert chosen <= 1.05 * min(others)
    assert chosen < 0.95 * time_of(held.of(None), 2, [starts], comm), "better than what one long document gets"


def test_every_rank_chooses_alike_and_remembers() -> None:
    draws = np.random.default_rng(0)
    one, other = shards(96, 3, 2), shards(96, 3, 2)
    for _ in range(20):
        starts = [np.unique(np.append(draws.integers(1, 96, 6), 0)) for _ in range(2)]
        held = one.of(starts)
        assert held == other.of([x.copy() for x in starts]) and one.of(starts) is held
        positions = np.concatenate([held.positions(rank) for rank in range(6)])
        assert sorted(positions) == list(range(96)) and held.length == 16


def test_samples_are_told_apart() -> None:
    held = shards(64, 2, 1)
    assert held.of([np.array([0, 10]), np.array([0, 20])]) is not held.of([np.array([0, 20]), np.array([0, 10])])


@given(ring=st.integers(1, 4), ulysses=st.integers(1, 3), parts=st.integers(1, 4), data=st.data())
def test_balanced_is_a_partition(ring: int, ulysses: int, parts: int, data: st.DataObject) -> None:
    work = data.draw(st.lists(st.integers(0, 9), min_size=ring * parts, max_size=ring * parts))
    length = ring * parts * ulysses * 2
    held = ShardMap.balanced(length, ring, ulysses, work)
    assert sorted(np.concatenate([held.positions(rank) for rank in range(held.ranks)])) == list(range(length))
    assert {len(held.positions(rank)) for rank in range(held.ranks)} == {length // ring // ulysses}


def test_balanced_pairs_heavy_with_light() -> None:
    loads = [
        sum(work for i, work in enumerate((9, 1, 5, 3, 4, 6)) if any(a <= 2 * i < b for a, b in ranges))
        for ranges in ShardMap.balanced(12, 3, 1, (9, 1, 5, 3, 4, 6)).ranges
    ]
    assert loads == [10, 9, 9]


def test_contiguous() -> None:
    """Where there is nothing to choose, and for LightSeq, which balances one document by itself."""
    for starts in (None, [documents(10, 54)]):
        assert shards(64, 1, 2).of(starts) == ShardMap.contiguous(64, 2)
    assert shards(64, 4, 2, "lightseq").of([documents(64)]) == ShardMap.contiguous(64, 8)


def test_the_order_of_ranks_is_that_of_their_loads() -> None:
    """All permutations of the parts' work give loads that are as even."""
    for work in itertools.islice(itertools.permutations(range(6)), 0, None, 37):
        held = ShardMap.balanced(6, 3, 1, work)
        assert {sum(work[p] for p in held.positions(rank)) for rank in range(3)} == {5}
