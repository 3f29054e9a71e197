"""The most that a pipeline rank holds at a time: its schedule, walked with the bytes of its stages. Pure Python.

The walk does what `executor.py` and `messages.py` do: what a forward keeps stays until its backward (of split backwards
what waits for W until that), a receive is posted while the action before it runs, and what was sent stays until a
message of the receiver tells that it has been used.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from megasp.footprint import Footprint, Weights
from megasp.pipeline.schedules import Action, Schedule


class Moment(NamedTuple):
    """What is there beside what was there before an action, in bytes.

    Attributes:
        total: all of it; `gathered`: weights, and buffers that they are gathered in; `gradients`: without a buffer;
            `buffers`: of their reduction.
    """

    total: int
    gathered: int = 0
    gradients: int = 0
    buffers: int = 0


@dataclass(frozen=True)
class StageBytes:
    """One microbatch through a stage.

    Attributes:
        pieces: what runs one after another: embedding, layers, head; `weights`: those of each.
        shared: kept once by all of them.
        reduces: after which backwards gradients are reduced: "always", the "last", "finally" when all are over, or
            "never".
        apart: a backward's gradients are made in another dtype than that of their sums.
        gathers_once: weights are gathered in a step's first forward alone.
        tied: of the head's gradient, where it waits for that of the embedding, which is the same tensor.
    """

    pieces: Sequence[Footprint]
    weights: Sequence[Weights]
    shared: int = 0
    reduces: str = "never"
    apart: bool = False
    gathers_once: bool = False
    tied: int = 0

    @cached_property
    def kept(self) -> int:
        return self.shared + sum(piece.total for piece in self.pieces)

    @cached_property
    def whole(self) -> int:
        """Bytes of weights that stay whole for a step."""
        return sum(each.weights for weights in self.weights for each in weights.reductions)

    @cached_property
    def deferred(self) -> int:
        return sum(piece.deferred for piece in self.pieces)

    def forward(self, gathers: bool) -> Moment:
        """The fullest moment of a forward that `gathers` weights or finds them whole."""
        kept, given, most = self.shared, 0, Moment(-self.whole)
        missing = sum(weights.whole for weights in self.weights) if gathers else 0
        for piece, weights in zip(self.pieces, self.weights, strict=True):
            before, missing = weights.arriving * gathers - missing, missing - weights.whole * gathers
            gathered = weights.forward * gathers - missing
            runs = Moment(kept + piece.forward + gathered, gathered)
            most = max(most, runs, Moment(kept + given + before, before))
            kept, given = kept + piece.total, piece.output
        return most

    def backward(self, kind: str, fresh: bool, reducing: bool, sharded: bool, last: bool) -> tuple[Moment, int, int]:
        """Of a backward, from the last piece to the first; what is kept goes, gradients and what waits for W come.

        Args:
            fresh: no gradients of earlier ones are there; `sharded`: shards of their sums are.
            reducing: it reduces gradients; `last`: of the stage, so that it lets go of weights that are whole.
        Returns:
            The fullest moment; by how much gradients have grown; a buffer of their reduction that is left.
        """
        kept = grown = buffer = gone = 0
        most, off = Moment(-self.kept - self.whole), kind == "I"
        waiting = self.tied
        for piece, weights in zip(reversed(self.pieces), reversed(self.weights), strict=True):
            made = weights.gradients if fresh and not (off and piece.deferred) else 0
            needed = piece.put_off if off else piece.growing if made or self.apart else piece.backward
            begun = kept + grown + buffer
            for size, gathered in ((piece.output, weights.returning), (needed - piece.total, weights.backward)):
                most = max(most, Moment(begun + size + gathered - gone, gathered - gone, grown, buffer))
            kept += piece.deferred * off - piece.total + (0 if made else waiting)
            waiting = 0
            grown += made // weights.units if reducing else made
            for number, each in enumerate(weights.reductions if reducing else (), 1):
                gone += each.weights * last
                buffer, gathered = each.buffer, weights.ahead - gone
                held, sums = kept + piece.output + gathered, buffer + each.arriving
                most = max(most, Moment(held + grown + sums, gathered, grown, sums))
                grown += (0 if sharded else each.shard) - each.whole + made // weights.units * (number < weights.units)
        return most, grown, buffer

    def put_off(self, fresh: bool) -> tuple[Moment, int]:
        """The fullest moment of W, and the gradients that it adds."""
        made = sum(
            weights.gradients for piece, weights in zip(self.pieces, self.weights, strict=True) if piece.deferred
        )
        # Autograd takes a copy of each where there is no sum to add to.
        grown, largest = made * fresh, max(piece.largest for piece in self.pieces)
        working = max(piece.beside for piece in self.pieces) if grown else largest if made else 2 * largest
        return Moment(grown + working, gradients=grown), grown


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a rank.

    Attributes:
        action: what runs then; `live`: stage -> microbatches that it holds (those of W counted, too).
        activations: kept by all of them; `working`: what the action itself needs beside; `messages`: to and from other
            ranks.
        gathered: weights that are whole for a time, with the buffers that they are gathered in; less than 0 where those
            of a step are not there yet, or any more.
        gradients: that are there, where they have no buffer; `buffers`: of their reduction.
    """

    action: Action
    live: dict[int, int]
    activations: int
    working: int
    messages: int
    gathered: int
    gradients: int
    buffers: int

    @property
    def total(self) -> int:
        held = self.activations + self.working + self.messages
        return held + self.gathered + self.gradients + self.buffers


def peak(schedule: Schedule, rank: int, stages: Mapping[int, StageBytes], message: int) -> Peak:
    """The fullest moment of `rank`.

    Args:
        stages: of this rank, by number.
        message: bytes of a message between stages.
    """
    walk = _Walk(schedule, rank, stages, message)
    for index in range(len(schedule.rows[rank])):
        walk.step(index)
    walk.finish()
    assert walk.fullest is not None, "a schedule has actions"
    return walk.fullest


class _Walk:
    """What a rank holds, action by action."""

    def __init__(self, schedule: Schedule, rank: int, stages: Mapping[int, StageBytes], message: int) -> None:
        self.schedule, self.rank, self.stages, self.message = schedule, rank, stages, message
        self.row = schedule.rows[rank]
        self.last_of = {(action.kind, action.stage): index for index, action in enumerate(self.row)}
        self.kept = self.gradients = self.buffer = 0
        self.whole = -sum(stage.whole for stage in stages.values())  # weights, beside all that there may be
        self.live: Counter[int] = Counter()
        self.made: set[tuple[int, str]] = set()  # stages with gradients of B (or I), and of W
        self.forwards: Counter[int] = Counter()
        self.arriving: set[Action] = set()
        self.expected = {edge: deque(sent) for edge, sent in schedule.messages.items() if edge[1] == rank}
        self.sending: dict[int, deque[int]] = {}
        self.fullest: Peak | None = None
        self.forward = cache(lambda number, gathers: stages[number].forward(gathers))
        self.backward = cache(lambda number, *how: stages[number].backward(*how))

    def step(self, index: int) -> None:
        """Run action `index` of the row on paper; its fullest moment is kept where it is the fullest so far."""
        action = self.row[index]
        stage, number = self.stages[action.stage], action.stage
        self._take(action)
        for following in self.row[index + 1 : index + 2]:
            self._expect(following)
        if action.kind == "F":
            first = not self.forwards[number]
            self.whole += stage.whole * first
            self._note(action, self.forward(number, first or not stage.gathers_once))
            self.forwards[number] += 1
        elif action.kind == "W":
            moment, grown = stage.put_off((number, "W") not in self.made)
            self._note(action, moment)
            self._grow((number, "W"), grown)
        else:
            self._run_backward(action, stage, last=self.last_of[action.kind, number] == index)
        self._after(action)

    def _run_backward(self, action: Action, stage: StageBytes, last: bool) -> None:
        number, always = action.stage, stage.reduces == "always"
        seen = (number, "B") in self.made
        self.buffer = 0
        ends = last and stage.reduces != "finally"
        how = action.kind, always or not seen, always or (last and stage.reduces == "last"), seen, ends
        moment, grown, left = self.backward(number, *how)
        self._note(action, moment)
        self._grow((number, "B"), grown)
        self.buffer, self.whole = (0, self.whole - stage.whole) if ends else (left, self.whole)

    def finish(self) -> None:
        """Reduce what was put off to the end."""
        late = [stage for stage in self.stages.values() if stage.reduces == "finally"]
        for each in (each for stage in late for weights in stage.weights for each in weights.reductions):
            self.whole -= each.weights
            self._note(self.row[-1], Moment(each.buffer + each.arriving, buffers=each.buffer + each.arriving))
            self.gradients += each.shard - each.whole

    def _note(self, action: Action, moment: Moment) -> None:
        """Keep a moment where it is the fullest so far."""
        messages = self.message * (len(self.arriving) + sum(map(len, self.sending.values())))
        gathered = moment.gathered + self.whole
        buffers = moment.buffers + self.buffer
        activations = self.kept + moment.total - moment.gathered - moment.gradients - moment.buffers
        kept = min(self.kept, activations)  # at a backward's end little of it is left
        gradients = self.gradients + moment.gradients
        found = Peak(action, dict(self.live), kept, activations - kept, messages, gathered, gradients, buffers)
        if self.fullest is None or found.total > self.fullest.total:
            self.fullest = found

    def _grow(self, made: tuple[int, str], grown: int) -> None:
        self.gradients += grown
        self.made.add(made)

    def _after(self, action: Action) -> None:
        stage = self.stages[action.stage]
        waiting = stage.deferred
        self.kept += {"F": stage.kept, "B": -stage.kept, "I": waiting - stage.kept, "W": -waiting}[action.kind]
        self.live[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
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
