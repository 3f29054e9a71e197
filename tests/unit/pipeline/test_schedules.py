"""Schedules against the closed forms of their papers, in the papers' unit: F = I = W = 1, B = 2 of a rank's layers."""

import itertools

import pytest

from megasp.pipeline.schedules import Action, Schedule, placement, schedule
from megasp.pipeline.simulate import Deadlock, Timeline, simulate, unit_cost

RANKS, MICROBATCHES = range(1, 9), range(1, 25)
KINDS = {"gpipe": "FB", "1f1b": "FB", "interleaved": "FB", "zb-h1": "FIW", "zbv": "FIW"}


def run(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Timeline:
    return simulate(schedule(name, ranks, microbatches, chunks), unit_cost(chunks))


def spans(timeline: Timeline) -> list[float]:
    """From each rank's first action to the end of its last."""
    return [timeline.end[row[-1]] - timeline.start[row[0]] for row in timeline.schedule.rows]


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 3), ("zbv", 2)])
def test_every_action_once_on_its_rank(name: str, chunks: int) -> None:
    for ranks, microbatches in itertools.product((1, 2, 3, 4), (4, 12)):
        made = schedule(name, ranks, microbatches - microbatches % ranks, chunks)
        where = placement(name, ranks, chunks)
        assert made.owner == dict(enumerate(where))
        expected = {
            Action(kind, stage, m)
            for kind in KINDS[name]
            for stage in range(len(where))
            for m in range(made.microbatches)
        }
        assert sorted(itertools.chain(*made.rows)) == sorted(expected)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_one_chunk_makespan(name: str) -> None:
    for ranks, microbatches in itertools.product(RANKS, MICROBATCHES):
        assert run(name, ranks, microbatches).makespan == 3 * (microbatches + ranks - 1)


def test_one_f_one_b_peak() -> None:
    """arXiv 2104.04473: at most P live microbatches, on rank r P - r of them; GPipe holds all M."""
    for ranks, microbatches in itertools.product(RANKS, MICROBATCHES):
        assert run("1f1b", ranks, microbatches).peak == [min(microbatches, ranks - r) for r in range(ranks)]
        assert run("gpipe", ranks, microbatches).peak == [microbatches] * ranks


def test_interleaved_makespan() -> None:
    for ranks, chunks, groups in itertools.product(RANKS, (2, 3, 4), (2, 3, 4)):
        timeline = run("interleaved", ranks, ranks * groups, chunks)
        assert timeline.makespan == pytest.approx(3 * ranks * groups + 3 * (ranks - 1) / chunks)
        assert max(timeline.peak) == ranks * chunks + ranks - 1
        assert timeline.messages == (2 * (ranks * chunks - 1) * ranks * groups if ranks > 1 else 0)


def test_zb_h1_makespan_and_peak() -> None:
    """arXiv 2401.10241, section 2.2: a third of 1F1B's bubble, at no more memory than its fullest rank."""
    for ranks, microbatches in itertools.product(RANKS, MICROBATCHES):
        timeline = run("zb-h1", ranks, microbatches)
        assert max(timeline.peak) == max(run("1f1b", ranks, microbatches).peak)
        if microbatches >= ranks:
            assert timeline.makespan == 3 * microbatches + ranks - 1


def test_zbv_has_no_bubbles() -> None:
    """arXiv 2401.10241, section 6: no rank waits between its first action and its last, activations are 1F1B's
    fullest rank's on every rank (2P chunks of half a rank's layers), and ranks start half a forward apart."""
    for ranks, microbatches in itertools.product(RANKS, MICROBATCHES):
        timeline = run("zbv", ranks, microbatches, 2)
        assert max(timeline.peak) <= 2 * ranks
        if microbatches >= 2 * ranks - 1:
            assert spans(timeline) == pytest.approx([3 * microbatches] * ranks)
            assert timeline.makespan == pytest.approx(3 * microbatches + (ranks - 1) / 2)
            assert timeline.peak == [2 * ranks] * ranks


def test_order_of_messages() -> None:
    """Messages are used in the order in which they are sent, but for zbv, where one must be taken in early."""
    for ranks, groups in itertools.product(RANKS, (1, 2, 5)):
        for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1)):
            assert run(name, ranks, ranks * groups, chunks).waiting == 0
        assert run("zbv", ranks, ranks * groups, 2).waiting <= 1


def test_a_cycle_is_found() -> None:
    """Rank 1 wants the second microbatch first, and rank 0 the first one's gradient before it sends the second."""
    rows = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
        (Action("F", 1, 1), Action("B", 1, 1), Action("F", 1, 0), Action("B", 1, 0)),
    )
    with pytest.raises(Deadlock, match="0B0, 1F1 wait for one another"):
        simulate(Schedule("mine", rows, 2), unit_cost())


def test_forward_only_runs() -> None:
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("zbv", 2)):
        made = schedule(name, 4, 8, chunks).forward_only()
        assert simulate(made, unit_cost(chunks)).makespan >= 8
        assert {action.kind for row in made.rows for action in row} == {"F"}
