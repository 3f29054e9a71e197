"""What a schedule costs: runs its lists on a clock. Pure Python.

A rank works one action after another; an action begins when its rank is free and the results that it needs are there.
Receives are posted in the order in which the other side sends (both sides know the lists) and sends never block, so a
schedule can deadlock only by a cycle of actions that wait for one another, and `simulate` finds every such cycle.
"""

from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from megasp.pipeline.schedules import Action, Row, Schedule

Cost = Callable[[Action], float]
"""Seconds (or any unit) of an action."""


class Deadlock(Exception):
    """A schedule in which actions wait for one another for ever; names the first one of each waiting rank."""


@dataclass(frozen=True)
class Timeline:
    """A schedule with times.

    Attributes:
        start, end: of each action.
    """

    schedule: Schedule
    start: dict[Action, float]
    end: dict[Action, float]

    @property
    def makespan(self) -> float:
        return max(self.end.values())

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        work = sum(self.end[action] - self.start[action] for action in self.start)
        return 1 - work / (self.makespan * self.schedule.ranks)

    @property
    def messages(self) -> int:
        """Messages between ranks in a step."""
        return sum(map(len, self.schedule.messages.values()))

    @property
    def peak(self) -> list[int]:
        """Largest number of live activations (forwards whose backward, or W, is not done) on each rank, in chunks."""
        return [live_activations(row) for row in self.schedule.rows]

    @cached_property
    def waiting(self) -> int:
        """Largest number of messages that a rank must have taken in before it uses them, because they were sent before
        one that it needs first; 0 where the order of sending is the order of use."""
        most = 0
        for sent in self.schedule.messages.values():
            used: list[int] = []  # places in the receiver's row of what was sent before, sorted
            for action in sent:
                place = self.schedule.place[action]
                most = max(most, len(used) - bisect_right(used, place))
                insort(used, place)
        return most


def unit_cost(chunks: int = 1) -> Cost:
    """The unit of the papers: a rank's forward, its input gradient and its weight gradient take 1 each."""
    times = {"F": 1 / chunks, "B": 2 / chunks, "I": 1 / chunks, "W": 1 / chunks}
    return lambda action: times[action.kind]


def simulate(schedule: Schedule, cost: Cost, message: float = 0.0) -> Timeline:
    """Times of every action.

    Args:
        cost: of each action.
        message: what it takes from the end of an action until its result is on another rank.
    Raises:
        Deadlock: the lists cannot run to their end.
    """
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    free, place = [0.0] * schedule.ranks, [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            while place[rank] < len(row):
                action = row[place[rank]]
                arrivals = _arrivals(schedule, action, end, message)
                if arrivals is None:
                    break
                start[action] = max([free[rank], *arrivals])
                free[rank] = end[action] = start[action] + cost(action)
                place[rank] += 1
                moved = True
    stuck = [str(row[at]) for row, at in zip(schedule.rows, place, strict=True) if at < len(row)]
    if stuck:
        raise Deadlock(f"{schedule.name}: {', '.join(stuck)} wait for one another")
    return Timeline(schedule, start, end)


def _arrivals(schedule: Schedule, action: Action, end: dict[Action, float], message: float) -> list[float] | None:
    """When the results that an action needs are on its rank; None while one of them is not computed."""
    kind, stage, microbatch = action
    times = []
    if kind != "F":
        times.append(end.get(Action("I" if kind == "W" else "F", stage, microbatch)))
    source = schedule.source(action)
    if source is not None:
        local = schedule.owner[source.stage] == schedule.owner[stage]
        there = end.get(source)
        times.append(there if there is None or local else there + message)
    return None if None in times else times  # type: ignore[return-value]


def live_activations(row: Row) -> int:
    """Most forwards whose activations are held at a time: until B, or W, for the weight gradient needs them, too."""
    live = peak = 0
    for action in row:
        live += (action.kind == "F") - (action.kind in "BW")
        peak = max(peak, live)
    return peak
