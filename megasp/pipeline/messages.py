"""Messages between stages: activations forward, gradients back, over a link for each direction of two ranks.

Receives are posted in the order in which the other side sends, which both know from the schedule, and before the
message is needed; sends do not wait. So no pair of ranks can block each other, whatever the order of use.
"""

from collections import deque

import torch
from torch import Tensor

from megasp.collectives import Pending, start_receive, start_send
from megasp.parallel_state import ParallelState
from megasp.pipeline.schedules import Action, Schedule


class Messages:
    """The messages of one rank in one run of a schedule.

    A message is named by the action that needs it. Between two stages of one rank it is handed over as it is.

    Args:
        shape, dtype: of every message.
    """

    def __init__(self, schedule: Schedule, state: ParallelState, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.schedule, self.state, self.shape, self.dtype = schedule, state, shape, dtype
        self._expected = {edge: deque(sent) for edge, sent in schedule.messages.items() if edge[1] == state.pp.rank}
        self._arriving: dict[Action, Pending] = {}
        # By receiving rank: where in its row it needs what we sent.
        self._sending: dict[int, deque[tuple[int, Pending]]] = {to: deque() for _, to in schedule.messages}

    def expect(self, action: Action) -> None:
        """Post the receive of what `action` needs, and of what is sent before it."""
        source = self.schedule.source(action)
        if source is None or action in self._arriving or self.schedule.owner[source.stage] == self.state.pp.rank:
            return
        edge = self.schedule.owner[source.stage], self.state.pp.rank
        while action not in self._arriving:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.state.device)
            self._arriving[self._expected[edge].popleft()] = start_receive(buffer, self.state.links[edge])

    def take(self, action: Action) -> Tensor | None:
        """What `action` needs from another stage, as soon as it is here; None if it needs nothing."""
        source = self.schedule.source(action)
        if source is None:
            return None
        self.expect(action)
        message = self._arriving.pop(action).wait()
        if (sender := self.schedule.owner[source.stage]) != self.state.pp.rank:
            self._release(sender, self.schedule.place[source])
        return message

    def _release(self, peer: int, progress: int) -> None:
        """Let go of what `peer` has used: its message tells how far it is in its row."""
        sending = self._sending.get(peer) or deque()
        while sending and sending[0][0] <= progress:
            sending.popleft()[1].wait()

    def send(self, action: Action, result: Tensor) -> None:
        """Pass on the result of `action` to the stage that needs it."""
        wanted = self.schedule.destination(action)
        assert wanted is not None, action
        edge = self.state.pp.rank, self.schedule.owner[wanted.stage]
        if edge[0] == edge[1]:
            self._arriving[wanted] = Pending(result)
            return
        sending = self._sending[edge[1]]
        while sending and sending[0][1].done():  # an evaluation's receivers send nothing back that would tell
            sending.popleft()
        sending.append((self.schedule.place[wanted], start_send(result, self.state.links[edge])))

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for peer in self._sending:
            self._release(peer, len(self.schedule.rows[peer]))
