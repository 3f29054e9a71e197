"""Pipeline schedules as data: for each rank the list of its actions in order. Pure Python.

An action is a kind, a stage and a microbatch, printed as `2F0`:

    F  forward
    B  whole backward
    I  gradient of the stage's input           (B in two, arXiv 2401.10241: only I has another stage wait for it,
    W  gradients of the weight matrices         so W fills what would be bubbles)

Stages are numbered along the model. A rank holds one of them, or several *chunks* (virtual stages):

    gpipe        arXiv 1811.06965   all forwards, then all backwards
    1f1b         arXiv 2104.04473   one forward, one backward in turn: as fast, and P live microbatches instead of M
    interleaved  arXiv 2104.04473   V chunks a rank, stage s on rank s mod P: bubbles 1 / V as long
    zb-h1        arXiv 2401.10241   1f1b with W after I: bubbles a third as long, memory as 1f1b
    zbv          arXiv 2401.10241   two chunks a rank, down the ranks and up again: no bubbles where F = I = W
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple


class Action(NamedTuple):
    """One piece of work of one stage on one microbatch."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Row = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What every rank of a pipeline does.

    Attributes:
        name: which schedule.
        rows: the actions of each rank, in order.
        microbatches: M.
    """

    name: str
    rows: tuple[Row, ...]
    microbatches: int

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @cached_property
    def owner(self) -> dict[int, int]:
        """Stage -> the rank that holds it."""
        return {action.stage: rank for rank, row in enumerate(self.rows) for action in row}

    @cached_property
    def place(self) -> dict[Action, int]:
        """Action -> its index in its rank's row."""
        return {action: index for row in self.rows for index, action in enumerate(row)}

    @property
    def stages(self) -> int:
        return len(self.owner)

    def source(self, action: Action) -> Action | None:
        """The action of a neighbouring stage whose result this one needs, if it needs one."""
        if action.kind == "F":
            return Action("F", action.stage - 1, action.microbatch) if action.stage else None
        if action.kind == "W" or action.stage == self.stages - 1:
            return None
        return Action(action.kind, action.stage + 1, action.microbatch)

    def destination(self, action: Action) -> Action | None:
        """The action of a neighbouring stage that needs this one's result: the inverse of `source`."""
        if action.kind == "F":
            return Action("F", action.stage + 1, action.microbatch) if action.stage < self.stages - 1 else None
        if action.kind == "W" or not action.stage:
            return None
        return Action(action.kind, action.stage - 1, action.microbatch)

    @cached_property
    def messages(self) -> dict[tuple[int, int], list[Action]]:
        """(from rank, to rank) -> the actions at `to` that wait for a message, in the order of sending."""
        sent: dict[tuple[int, int], list[Action]] = {}
        for rank, row in enumerate(self.rows):
            for wanted in filter(None, map(self.destination, row)):
                if self.owner[wanted.stage] != rank:
                    sent.setdefault((rank, self.owner[wanted.stage]), []).append(wanted)
        return sent

    def forward_only(self) -> "Schedule":
        """The same order without backwards: evaluation."""
        return replace(self, rows=tuple(tuple(a for a in row if a.kind == "F") for row in self.rows))


def placement(name: str, ranks: int, chunks: int) -> list[int]:
    """The rank of each stage. zbv goes down the ranks and up again, so both ends of the model are on rank 0.

    placement("interleaved", 4, 2)   0 1 2 3 0 1 2 3
    placement("zbv", 4, 2)           0 1 2 3 3 2 1 0
    """
    loop = list(range(ranks))
    return loop + loop[::-1] if name == "zbv" else loop * chunks


@cache
def schedule(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule of one step.

    Args:
        name: one of those above.
        ranks: P, pipeline-parallel ranks.
        microbatches: M; interleaved needs a multiple of P.
        chunks: V, stages of a rank: any for interleaved, 2 for zbv, else 1.
    """
    rows = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _one_f_one_b, "zb-h1": _zb_h1, "zbv": _zbv}[name]
    return Schedule(name, tuple(tuple(rows(rank, ranks, microbatches, chunks)) for rank in range(ranks)), microbatches)


def _gpipe(rank: int, ranks: int, microbatches: int, chunks: int) -> Iterator[Action]:
    for kind in "FB":
        yield from (Action(kind, rank, microbatch) for microbatch in range(microbatches))


def _one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int) -> Iterator[Action]:
    """Warm-up forwards, then pairs of a forward and a backward, then the backwards that are left.

    With chunks, P microbatches at a time pass chunk after chunk; a rank then warms up with all its earlier chunks and
    twice the way to the last rank, for a microbatch comes round again before its first backward.
    """

    def unit(k: int) -> tuple[int, int]:
        """The k-th unit of work: chunk, microbatch."""
        return k // ranks % chunks, k // (ranks * chunks) * ranks + k % ranks

    units = [unit(k) if chunks > 1 else (0, k) for k in range(microbatches * chunks)]
    forwards = deque(Action("F", chunk * ranks + rank, m) for chunk, m in units)
    backwards = deque(Action("B", (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in units)
    for _ in range((ranks - rank - 1) * min(chunks, 2) + (chunks - 1) * ranks):
        if forwards:
            yield forwards.popleft()
    while forwards:
        yield forwards.popleft()
        yield backwards.popleft()
    yield from backwards


def _zb_h1(rank: int, ranks: int, microbatches: int, chunks: int) -> Iterator[Action]:
    """1F1B's order; rank r lets r weight gradients lag behind, and they fill its wait for the last backwards."""
    lag: deque[Action] = deque()
    for action in _one_f_one_b(rank, ranks, microbatches, chunks):
        if action.kind == "F":
            yield action
            continue
        yield action._replace(kind="I")
        lag.append(action._replace(kind="W"))
        if len(lag) > rank:
            yield lag.popleft()
    yield from lag


def _zbv(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Action]:
    """Section 6 of the paper: a warm-up that fills the V, groups of `F I W` of both chunks in turn, and a drain in
    which W waits until no I is left that another rank needs.

    The pattern is that of 2P - 1 microbatches or more; with fewer its later ones are left out.
    """
    down, up = rank, 2 * ranks - 1 - rank
    pattern = max(microbatches, 2 * ranks - 1)
    done: Counter[tuple[str, int]] = Counter()
    row: list[Action] = []

    def add(kinds: str, stage: int) -> None:
        for kind in kinds:
            row.append(Action(kind, stage, done[kind, stage]))
            done[kind, stage] += 1

    add("F" * (2 * (ranks - rank) - 1), down)
    for _ in range(rank):
        add("F", up)
        add("F", down)
    for _ in range(ranks - rank):
        add("FIW", up)
    while done["F", up] < pattern:
        add("F" if done["F", down] < pattern else "", down)
        add("IW", down)
        add("FIW", up)
    for _ in range(rank):
        add("I", down)
        add("I", up)
    for _ in range(ranks - rank):
        add("IW", down)
    for stage in (up, down):
        add("W" * (pattern - done["W", stage]), stage)
    return [action for action in row if action.microbatch < microbatches]
