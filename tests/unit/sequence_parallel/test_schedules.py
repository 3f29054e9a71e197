"""Schedules compute every pair once, use only what has arrived, and send what their papers say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.sequence_parallel.schedules import (
    DKV,
    DQ,
    KV,
    OUT,
    SCHEDULES,
    Pairs,
    Q,
    Schedule,
    Step,
    Task,
    draw,
    lightseq,
    ring,
    simulate,
)


def causal(ranks: int) -> Pairs:
    """Of contiguous shards of 4 tokens."""
    return {(q, k): 10 if q == k else 16 for q in range(ranks) for k in range(q + 1)}


def every(ranks: int) -> Pairs:
    """Of zigzag shards."""
    return dict.fromkeys(itertools.product(range(ranks), repeat=2), 8)


def check_arrivals(steps: tuple[Step, ...], ranks: int) -> None:
    """What a task or a message needs is its rank's own or came with the step before; nothing comes in vain."""
    arrived: set[tuple[int, str, int, int]] = set()
    for step in steps:
        for task in step.tasks:
            assert task.q == task.rank or (task.rank, Q, task.q, 0) in arrived
            assert task.k == task.rank or (task.rank, KV, task.k, task.part) in arrived
        for m in step.messages:
            assert m.source != m.target and 0 <= m.source < ranks and 0 <= m.target < ranks
            assert m.what in (OUT, DKV, DQ) or m.source == m.owner or (m.source, m.what, m.owner, m.part) in arrived
        arrived = {(m.target, m.what, m.owner, m.part) for m in step.messages}
    assert not {what for _, what, _, _ in arrived} & {KV, Q}, "sent and never used"


def check_sums(schedule: Schedule) -> None:
    """Each share of a gradient reaches its owner exactly once."""
    at: dict[tuple[int, str, int, int], int] = {}  # (rank, what, owner, part) -> shares summed there
    total = 0
    for step in schedule.backward:
        moved = [(m, at.pop((m.source, m.what, m.owner, m.part), 0)) for m in step.messages if m.what in (DKV, DQ)]
        assert all(shares for _, shares in moved), "an empty sum was sent"
        for task in step.tasks:
            for key in ((task.rank, DQ, task.q, 0), (task.rank, DKV, task.k, task.part)):
                at[key] = at.get(key, 0) + 1
                total += 1
        for m, shares in moved:
            key = (m.target, m.what, m.owner, m.part)
            at[key] = at.get(key, 0) + shares
    assert sum(at.values()) == total and all(rank == owner for rank, _, owner, _ in at)


@st.composite
def pairs_of_ranks(draw_value: st.DrawFn) -> tuple[int, Pairs]:
    ranks = draw_value(st.integers(1, 8))
    some = draw_value(st.dictionaries(st.sampled_from(sorted(every(ranks))), st.integers(1, 9)))
    return ranks, {(r, r): 1 for r in range(ranks)} | some


@pytest.mark.parametrize("mode", SCHEDULES)
@given(data=st.data(), parts=st.integers(1, 3))
def test_schedule_is_sound(mode: str, data: st.DataObject, parts: int) -> None:
    ranks, pairs = data.draw(pairs_of_ranks())
    schedule = SCHEDULES[mode](ranks, pairs, parts)
    for steps in (schedule.forward, schedule.backward):
        tasks = [(task.q, task.k, task.part) for step in steps for task in step.tasks]
        assert sorted(tasks) == sorted((q, k, part) for q, k in pairs for part in range(schedule.parts))
        check_arrivals(steps, ranks)
    check_sums(schedule)


def sent(steps: tuple[Step, ...], *what: str) -> int:
    return sum(m.what in what for step in steps for m in step.messages)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_lightseq_steps_and_volume(ranks: int) -> None:
    schedule = lightseq(ranks, causal(ranks))
    busy = [step for step in schedule.forward if step.tasks]
    assert len(busy) == ranks // 2 + 1
    if ranks % 2 == 0:  # arXiv 2310.03294 section 3.2, over all ranks
        assert sent(schedule.forward, KV) == ranks * (3 * ranks / 8 - 1 / 4)
        assert sent(schedule.forward, Q) == sent(schedule.forward, OUT) == ranks * (ranks / 8 - 1 / 4)
    else:  # every rank is busy in every step
        assert all(sorted(task.rank for task in step.tasks) == list(range(ranks)) for step in busy)


@pytest.mark.parametrize("ranks", [*range(1, 18), 64])
def test_lightseq_of_one_document_is_the_papers(ranks: int) -> None:
    """In step t rank r has the keys of r - t, or where there are none does queries of r + ranks - t with its own."""
    found = [set(step.tasks) for step in lightseq(ranks, causal(ranks)).forward if step.tasks]
    for t, tasks in enumerate(found):
        own = {Task(rank, rank, rank - t) for rank in range(t, ranks)}
        helped = {Task(rank, rank + ranks - t, rank) for rank in range(t)} if 2 * t != ranks else set()
        assert tasks == own | helped


@given(drawn=pairs_of_ranks())
def test_lightseq_helps_where_there_is_most_to_do(drawn: tuple[int, Pairs]) -> None:
    """Nobody has more to do than without help, or could give a task to a helper who would then have less."""
    ranks, pairs = drawn
    schedule, alone, load = lightseq(ranks, pairs), [0] * ranks, [0] * ranks
    tasks = [task for step in schedule.forward for task in step.tasks]
    for task in tasks:
        alone[task.q] += pairs[task.q, task.k]
        load[task.rank] += pairs[task.q, task.k]
    assert max(load) <= max(alone)
    busiest = max(range(ranks), key=lambda rank: (load[rank], rank))
    given_away = (task for task in tasks if task.rank == task.q == busiest != task.k)
    assert all(load[task.k] + pairs[task.q, task.k] >= load[busiest] for task in given_away)
    for rank in range(ranks):
        of_rank = [[pairs[t.q, t.k] for t in step.tasks if t.rank == rank] for step in schedule.forward]
        assert all(len(works) <= 1 for works in of_rank), "one at a time, so one arrival is held"
        remote = [work for works in of_rank[1:] for work in works]
        assert remote == sorted(remote, reverse=True)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_ring_hops(ranks: int) -> None:
    schedule = ring(ranks, every(ranks))
    hops = sent(schedule.forward, KV), sent(schedule.backward, KV), sent(schedule.backward, DKV)
    assert hops == (ranks * (ranks - 1),) * 3


def test_ring_stops_where_the_window_does() -> None:
    near = {(q, k): 1 for q, k in causal(8) if q - k <= 1}
    assert sent(ring(8, near).forward, KV) == 7 and len(ring(8, near).forward) == 2


def test_simulation_and_drawing() -> None:
    def work(task: Task) -> float:
        return 0.5 if task.q == task.k else 1.0

    assert simulate(lightseq(5, causal(5)).forward, 5, work) == (2.5, 1.0)
    time, balance = simulate(ring(5, causal(5)).forward, 5, work)
    assert (time, round(balance, 2)) == (4.5, 0.56)
    assert draw(lightseq(3, causal(3)).forward[:2], 3).splitlines() == [
        "rank 0   0 <- 0  2 <- 0*",
        "rank 1   1 <- 1  1 <- 0",
        "rank 2   2 <- 2  2 <- 1",
    ]
