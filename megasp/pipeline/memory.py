"""The most that a pipeline rank holds at a time: its schedule, walked with the bytes of its stages. Pure Python.

The walk does what `executor.py` and `messages.py` do: what a forward keeps stays until its backward (of split backwards
what waits for W until that), a receive is posted while the action before it runs, and what was sent stays until a
message of the receiver tells that it has been used.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megasp.footprint import Footprint
from megasp.pipeline.schedules import Action, Schedule


@dataclass(frozen=True)
class StageBytes:
    """One microbatch through a stage.

    Attributes:
        pieces: what runs one after another: embedding, layers, head.
        gradients: bytes of weight gradients that each of them makes, where these have no buffer.
        shared: kept once by all of them.
        reducing: gradients of one of them that are reduced while the one before runs backward; not those of the last
            `unreduced`, which wait for the end.
    """

    pieces: Sequence[Footprint]
    gradients: Sequence[int]
    shared: int = 0
    reducing: int = 0
    unreduced: int = 0

    @cached_property
    def kept(self) -> int:
        return self.shared + sum(piece.total for piece in self.pieces)

    @cached_property
    def deferred(self) -> int:
        return sum(piece.deferred for piece in self.pieces)


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a rank.

    Attributes:
        action: what runs then; `live`: stage -> microbatches that it holds (those of W counted, too).
        activations: kept by all of them; `working`: what the action itself needs beside; `messages`: to and from other
            ranks.
        gradients: made so far, where they have no buffer.
    """

    action: Action
    live: dict[int, int]
    activations: int
    working: int
    messages: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.working + self.messages + self.gradients


def peak(schedule: Schedule, rank: int, stages: Mapping[int, StageBytes], message: int) -> Peak:
    """The fullest moment of `rank`.

    Args:
        stages: of this rank, by number.
        message: bytes of a message between stages.
    """
    walk = _Walk(schedule, rank, stages, message)
    for index in range(len(schedule.rows[rank])):
        walk.step(index)
    assert walk.fullest is not None, "a schedule has actions"
    return walk.fullest


class _Walk:
    """What a rank holds, action by action."""

    def __init__(self, schedule: Schedule, rank: int, stages: Mapping[int, StageBytes], message: int) -> None:
        self.schedule, self.rank, self.stages, self.message = schedule, rank, stages, message
        self.row = schedule.rows[rank]
        self.kept = 0
        self.live: Counter[int] = Counter()
        self.made: set[int] = set()  # stages whose gradients are there
        self.gradients = 0  # their bytes
        self.arriving: set[Action] = set()
        self.expected = {edge: deque(sent) for edge, sent in schedule.messages.items() if edge[1] == rank}
        self.sending: dict[int, deque[int]] = {}
        self.fullest: Peak | None = None

    def step(self, index: int) -> None:
        """Run action `index` of the row on paper; its fullest moment is kept where it is the fullest so far."""
        action = self.row[index]
        self._take(action)
        for following in self.row[index + 1 : index + 2]:
            self._expect(following)
        before = self.kept
        most, gradients = getattr(self, {"F": "_forward", "W": "_weights"}.get(action.kind, "_backward"))(action)
        messages = self.message * (len(self.arriving) + sum(map(len, self.sending.values())))
        kept = min(before, most)  # at a backward's end little of it is left
        if self.fullest is None or most + messages + gradients > self.fullest.total:
            self.fullest = Peak(action, dict(self.live), kept, most - kept, messages, gradients)
        self._after(action)

    def _forward(self, action: Action) -> tuple[int, int]:
        stage = self.stages[action.stage]
        kept, most = self.kept + stage.shared, 0
        for piece in stage.pieces:
            most = max(most, kept + piece.forward)
            kept += piece.total
        return most, self.gradients

    def _backward(self, action: Action) -> tuple[int, int]:
        """From the last piece to the first; what is kept goes, gradients and what waits for W come."""
        stage = self.stages[action.stage]
        kept, most, gradients = self.kept, 0, self.gradients
        growing = action.stage not in self.made
        grown = at_most = 0
        for index, (piece, size) in enumerate(zip(reversed(stage.pieces), reversed(stage.gradients), strict=True)):
            reducing = stage.reducing if index > stage.unreduced else 0
            backward = piece.put_off if action.kind == "I" else piece.backward
            needed = kept + backward - piece.total + grown + reducing
            if needed > most:
                most, at_most = needed, grown
            kept += (piece.deferred if action.kind == "I" else 0) - piece.total
            grown += size if growing else 0
        return most - at_most, gradients + at_most

    def _weights(self, action: Action) -> tuple[int, int]:
        largest = max(piece.deferred for piece in self.stages[action.stage].pieces)
        return self.kept + largest, self.gradients

    def _after(self, action: Action) -> None:
        stage = self.stages[action.stage]
        waiting = stage.deferred
        self.kept += {"F": stage.kept, "B": -stage.kept, "I": waiting - stage.kept, "W": -waiting}[action.kind]
        self.live[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        if action.kind != "F" and action.stage not in self.made:
            self.made.add(action.stage)
            self.gradients += sum(stage.gradients)
        wanted = self.schedule.destination(action)
        if wanted is None:
            return
        peer = self.schedule.owner[wanted.stage]
        if peer == self.rank:
            self.arriving.add(wanted)
        else:
            self.sending.setdefault(peer, deque()).append(self.schedule.place[wanted])

    def _expect(self, action: Action) -> None:
        source = self.schedule.source(action)
        if source is None or action in self.arriving or self.schedule.owner[source.stage] == self.rank:
            return
        edge = self.schedule.owner[source.stage], self.rank
        while action not in self.arriving:
            self.arriving.add(self.expected[edge].popleft())

    def _take(self, action: Action) -> None:
        source = self.schedule.source(action)
        if source is None:
            return
        self._expect(action)
        self.arriving.discard(action)
        sending = self.sending.get(self.schedule.owner[source.stage], deque())
        while sending and sending[0] <= self.schedule.place[source]:
            sending.popleft()
