"""What one rank holds of a split attention, and the messages of a schedule's steps."""

from collections.abc import Iterator

from torch import Tensor

from megasp.collectives import start_exchange
from megasp.parallel_state import Axis
from megasp.sequence_parallel.parcels import Parcel, Partial
from megasp.sequence_parallel.schedules import DKV, DQ, OUT, Message, Step

Key = tuple[str, int, int]
"""(what, owner, part of the heads)."""

Own = dict[Key, tuple[Tensor, ...]]
Likes = dict[str, tuple[Tensor, ...]]
"""What -> tensors of the shapes and dtypes of such a message."""


class Transport:
    """One direction of an attention on this rank: what it holds and sends, by key.

    Args:
        own: this rank's tensors, [B, heads, S, ...] of any strides.
        like: what -> tensors of the shapes and dtypes of such a message; all shards are of one size.
    """

    def __init__(self, axis: Axis, own: Own, like: Likes) -> None:
        self.axis, self.own, self.like = axis, own, like
        self.arrived: dict[Key, Parcel] = {}
        self.outputs: dict[int, Partial] = {}
        self.sums: dict[Key, Parcel] = {}

    def steps(self, steps: tuple[Step, ...]) -> Iterator[Step]:
        """Each step, with its messages on their way while the caller computes."""
        rank = self.axis.rank
        packed: dict[Key, Parcel] = {}  # own tensors that go to several ranks are copied once
        for step in steps:
            sends = [(self._outgoing(m, packed).buffer, m.target) for m in step.messages if m.source == rank]
            incoming = [(m, Parcel.empty(self.like[m.what])) for m in step.messages if m.target == rank]
            pending = start_exchange(sends, [(parcel.buffer, m.source) for m, parcel in incoming], self.axis)
            yield step
            pending.wait()
            self.arrived = {}
            for message, parcel in incoming:
                self._receive(message, parcel)

    def _outgoing(self, message: Message, packed: dict[Key, Parcel]) -> Parcel:
        key = (message.what, message.owner, message.part)
        if message.what == OUT:
            partial = self.outputs.pop(message.owner)
            return Parcel.of((partial.lse, partial.out.to(self.like[OUT][1].dtype)))
        if message.what in (DKV, DQ):
            return self.sums.pop(key)
        if key in self.arrived:
            return self.arrived[key]
        if key not in packed:
            packed[key] = Parcel.of(self.own[key])
        return packed[key]

    def _receive(self, message: Message, parcel: Parcel) -> None:
        key = (message.what, message.owner, message.part)
        if message.what == OUT:
            lse, out = parcel.tensors
            self.outputs[message.owner].merge(out, lse)
        elif message.what in (DKV, DQ):
            self.sum(key).add_(parcel)
        else:
            self.arrived[key] = parcel

    def held(self, key: Key) -> tuple[Tensor, ...]:
        return self.arrived[key].tensors if key in self.arrived else self.own[key]

    def output(self, owner: int, q: Tensor) -> Partial:
        """What has been computed of the output of `owner`'s queries."""
        if owner not in self.outputs:
            self.outputs[owner] = Partial(q)
        return self.outputs[owner]

    def sum(self, key: Key) -> Parcel:
        """What has been computed of a gradient."""
        if key not in self.sums:
            self.sums[key] = Parcel.zeros(self.like[key[0]])
        return self.sums[key]
