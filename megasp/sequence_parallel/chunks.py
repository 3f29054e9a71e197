"""Attention of a sequence in chunks, one after another (FPDT, arXiv 2408.16978), as a ring over time.

Chunk i's queries see the keys of chunks 0 ... i. What the ring does with owners on other ranks happens here with owners
in the past: their keys and values are fetched from where they were left, on the device or on the host, while the block
before is computed.

    forward   chunk 0         chunk 1         chunk 2                 backward: chunk 2, then 1, then 0
    blocks    0 <- 0          1 <- 1  1 <- 0  2 <- 2  2 <- 1  2 <- 0
    fetched                   kv 0            kv 1    kv 0            with each kv the sum of its gradient so far, fp32

In the backward the last chunk comes first. When a chunk's turn has come, all that saw its keys have added to their
gradient, so the whole layer of a chunk runs backward at once, and nothing of it is left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megasp.host_copies import Copier, HostCopy, Staying
from megasp.sequence_parallel.blocks import Block
from megasp.sequence_parallel.parcels import Parcel, Partial
from megasp.sequence_parallel.schedules import DKV, KV, OUT, Schedule, Step, Task
from megasp.sequence_parallel.transport import Key, Likes, Own, Transport
from megasp.sequence_parallel.work import Work

LSE = "lse"


class Past:
    """What the chunks of one attention have left, as buffers of bytes by (what, number of the chunk).

    Args:
        copies: how they get to the host; without it they stay on the device.
    """

    def __init__(self, copies: Copier | None = None) -> None:
        self.copies = copies or Staying()
        self._held: dict[tuple[str, int], HostCopy] = {}
        self._keys: list[tuple[str, int]] = []  # of what was taken
        self._of_heads: dict[int, Past] = {}

    def for_chunk(self, number: int) -> "Past":
        """That of one chunk of the heads, where each is an attention of its own."""
        return self._of_heads.setdefault(number, Past(self.copies))

    def put(self, what: str, number: int, buffer: Tensor) -> None:
        """Leave a buffer."""
        self._held[what, number] = HostCopy.of(buffer, self.copies)

    def has(self, what: str, number: int) -> bool:
        return (what, number) in self._held

    def fetch(self, what: str, number: int) -> None:
        """Let it set off to the device."""
        if self.has(what, number):
            self._held[what, number].fetch()

    def get(self, what: str, number: int) -> Tensor:
        return self._held[what, number].get()

    def let_go(self, what: str, number: int) -> None:
        """Let the device's copy go."""
        if self.has(what, number):
            self._held[what, number].let_go()

    def pop(self, what: str, number: int) -> Tensor:
        """The last use of it."""
        return self._held.pop((what, number)).get()

    def drop(self, what: str, number: int) -> None:
        self._held.pop((what, number), None)

    def take_all(self) -> list[Tensor]:
        """All that was left, for `put_all` in the backward; nothing of it stays here."""
        self._keys = list(self._held)
        taken = []
        for held in self._held.values():
            held.let_go()
            taken.append(held.host)
        self._held.clear()
        return taken + [x for past in self._of_heads.values() for x in past.take_all()]

    def put_all(self, tensors: Sequence[Tensor]) -> None:
        """What `take_all` gave."""
        mine, rest = tensors[: len(self._keys)], tensors[len(self._keys) :]
        self._held = {key: HostCopy(self.copies, host) for key, host in zip(self._keys, mine, strict=True)}
        for past in self._of_heads.values():
            past.put_all(rest[: len(past._keys)])
            rest = rest[len(past._keys) :]


@dataclass(frozen=True)
class Chunk:
    """One chunk, as an owner of queries and keys. The first time it computes; the second time, which is for its
    gradients, it gives what it computed.

    Args:
        work: the blocks of every pair of chunks.
        number: this one's.
        past: what all of them have left.
    """

    work: Work
    number: int
    past: Past

    @cached_property
    def schedule(self) -> Schedule:
        """One step for each chunk that it sees: itself, whose keys are at hand, and then the others."""
        seen = [k for k in reversed(range(self.number + 1)) if self.work.blocks(self.number, k)]
        steps = tuple(Step((Task(self.number, self.number, k),), ()) for k in seen)
        return Schedule(steps, steps)

    @property
    def whole(self) -> Block | None:
        """No block is alone: gradients are sums over chunks."""
        return None

    def for_chunk(self, number: int) -> "Chunk":
        """The same for one chunk of the heads."""
        return replace(self, past=self.past.for_chunk(number))

    def transport(self, own: Own, like: Likes) -> "FromPast":
        last = self.number == len(self.work.held) - 1
        if DKV not in like and not last:
            self.past.put(KV, self.number, Parcel.of(own[KV, self.number, 0]).buffer)
        return FromPast(self, own, like)

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Leave out [B, N, S, H] and lse [B, N, S] for the second time. Each has a buffer of its own: pinned ones take
        a power of two."""
        for what, x in ((LSE, lse), (OUT, out.permute(2, 0, 1, 3))):
            self.past.let_go(what, self.number - 1)
            self.past.put(what, self.number, Parcel.of((x,)).buffer)

    def take(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """What was left, for queries [B, N, S, H]; None the first time."""
        if not self.past.has(OUT, self.number):
            return None
        wide = torch.promote_types(q.dtype, torch.float32)
        like = {LSE: q.new_empty((), dtype=wide).expand(q.shape[:3]), OUT: q.permute(2, 0, 1, 3)}
        lse, out = (Parcel.over(self.past.pop(what, self.number), (x,)).tensors[0] for what, x in like.items())
        return out.permute(1, 2, 0, 3), lse


class FromPast(Transport):
    """One direction of a chunk's attention: what it holds, and what comes from the past and goes back."""

    def __init__(self, chunk: Chunk, own: Own, like: Likes) -> None:
        self.past, self.number, self.own, self.like = chunk.past, chunk.number, own, like
        self.outputs: dict[int, Partial] = {}
        self.sums: dict[Key, Parcel] = {}

    def steps(self, steps: tuple[Step, ...]) -> Iterator[Step]:
        """Each step, with what the next one needs on its way while the caller computes."""
        backward, owners = DKV in self.like, [step.tasks[0].k for step in steps]
        for index, (step, owner) in enumerate(zip(steps, owners, strict=True)):
            for following in owners[index + 1 : index + 2]:
                self.past.fetch(KV, following)
                self.past.fetch(DKV, following)
            yield step
            self.past.let_go(KV, owner)
            if backward and owner != self.number:
                self.past.let_go(DKV, owners[index - 1])
                self.past.put(DKV, owner, self.sums.pop((DKV, owner, 0)).buffer)
        if backward:
            self.past.let_go(DKV, owners[-1])
            self.past.drop(KV, self.number)

    def held(self, key: Key) -> tuple[Tensor, ...]:
        if key in self.own:
            return self.own[key]
        return Parcel.over(self.past.get(key[0], key[1]), self.like[key[0]]).tensors

    def sum(self, key: Key) -> Parcel:
        what, owner, _ = key
        if key not in self.sums and what == DKV and self.past.has(what, owner):
            self.sums[key] = Parcel.over(self.past.pop(what, owner), self.like[what])
        return super().sum(key)
