"""Runs a schedule: the actions of this rank, one after another, on the stages that it holds.

    F   take the activation (or the tokens), run the stage, send its output; its activations stay
    B   take the output's gradient (the last stage has its own), run the backward, send the input's gradient
    I   the same, but weight gradients of linear layers wait in a queue
    W   compute them

One pipeline rank is the schedule of one rank: there is no other way through a training step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megasp.config.pipeline import PipelinePlan
from megasp.data import Batch
from megasp.model import GPTModel
from megasp.model.layers import defer_weight_gradients
from megasp.model.weight_gradients import WeightGradient, WeightGradients, compute
from megasp.parallel_state import ParallelState
from megasp.pipeline.messages import Messages
from megasp.pipeline.schedules import Action, Schedule, schedule

Watch = Callable[[str, Action], None]
"""Told of every action when it begins to "wait" for its message, when it "starts" and when it "ends"."""


class Pipeline:
    """The stages of one rank, and the schedule that they run.

    Args:
        plan: the schedule's name and sizes.
        stages: number -> model of each stage that this rank holds.
        before_gradients: called before every action that adds to gradients, with whether it is the last one of its kind
            on its stage in this step: then what it adds can be reduced over data-parallel ranks.
        dtype: of the residual stream.

    Attributes:
        watch: who is told what happens, if anybody.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        stages: Mapping[int, GPTModel],
        state: ParallelState,
        before_gradients: Callable[[bool], None],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plan, self.stages, self.state, self.before_gradients = plan, stages, state, before_gradients
        self.dtype = dtype
        self.watch: Watch = lambda event, action: None
        self.weight_gradients = WeightGradients()
        for model in stages.values():
            defer_weight_gradients(model, self.weight_gradients)
        self.schedule = cache(lambda microbatches: schedule(plan.schedule, plan.ranks, microbatches, plan.chunks))

    def train(self, microbatches: Sequence[Batch], divisor: float) -> Tensor:
        """Add the gradient of (sum of all token losses / divisor) to the parameters' gradients.

        Returns:
            The sum of the token losses, fp64 scalar, on the rank of the last stage; 0 elsewhere.
        """
        return _Run(self, self.schedule(len(microbatches)), microbatches, divisor).run()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch]) -> Tensor:
        """The same sum of token losses, forward only."""
        return _Run(self, self.schedule(len(microbatches)).forward_only(), microbatches, 1.0).run()


class _Entry(torch.autograd.Function):
    """What comes from the stage before. Nobody holds its values but who keeps them for the backward; its gradient is
    left in a list."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrived: list[Tensor], gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return arrived.pop()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:
        ctx.gradient.append(dx)
        return None, None, None


class _Exit(torch.autograd.Function):
    """Where the backward of a stage begins: it takes the output's gradient out of a list, so that the gradient is gone
    when the last layer has used it. A gradient that is given to `torch.autograd.backward` stays until that ends."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), device=out.device)

    @staticmethod
    def backward(ctx: Any, begin: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


class _Kept(NamedTuple):
    """What a backward needs of its forward, but for what autograd saved: where it begins, and the gradients of output
    and input, as soon as they are there."""

    begin: GradientEdge
    out: list[Tensor]
    x: list[Tensor]


class _Run:
    """One pass through a schedule, and what lives between its actions."""

    def __init__(self, pipeline: Pipeline, schedule: Schedule, batches: Sequence[Batch], divisor: float) -> None:
        self.pipeline, self.batches, self.divisor = pipeline, batches, divisor
        self.state = pipeline.state
        self.row = schedule.rows[self.state.pp.rank]
        self.last_of = {(action.kind, action.stage): action for action in self.row}
        model = next(iter(pipeline.stages.values()))
        shape = model.residual_shape(*batches[0].tokens.shape)
        self.messages = Messages(schedule, self.state, shape, pipeline.dtype)
        self.anchor = torch.zeros((), device=self.state.device, requires_grad=True)
        self.kept: dict[Action, _Kept] = {}
        self.deferred: dict[Action, list[WeightGradient]] = {}  # I -> what its W must compute
        self.total = torch.zeros((), dtype=torch.float64, device=self.state.device)

    def run(self) -> Tensor:
        """Every action of this rank; the sum of the token losses, fp64 scalar, 0 where the last stage is elsewhere."""
        act = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._weights}
        watch = self.pipeline.watch
        for action, following in zip(self.row, (*self.row[1:], None), strict=True):
            watch("wait", action)
            received = [message for message in (self.messages.take(action),) if message is not None]
            watch("start", action)
            if following is not None:
                self.messages.expect(following)  # it arrives while this action computes
            act[action.kind](action, received)
            watch("end", action)
        self.messages.finish()
        assert not self.kept and not self.deferred, "a forward without its backward"
        return self.total

    def _forward(self, action: Action, received: list[Tensor]) -> None:
        dx: list[Tensor] = []
        dout: list[Tensor] = []
        out = self._stage(action, _Entry.apply(self.anchor, received, dx) if received else None)
        if self.pipeline.stages[action.stage].head is not None:
            self.total += out.detach()
            dout.append(torch.full_like(out, 1 / self.divisor, requires_grad=False))
        else:
            self.messages.send(action, out.detach())
        if torch.is_grad_enabled():
            self.kept[action] = _Kept(get_gradient_edge(_Exit.apply(out, dout)), dout, dx)

    def _stage(self, action: Action, x: Tensor | None) -> Tensor:
        """Run a stage on the residual stream, or on the tokens of the microbatch."""
        model, batch = self.pipeline.stages[action.stage], self.batches[action.microbatch]

        def here(array) -> Tensor:  # type: ignore[no-untyped-def]
            return torch.as_tensor(array).to(self.state.device, non_blocking=True)

        labels, mask = (here(batch.labels), here(batch.loss_mask)) if model.head is not None else (None, None)
        position_ids = None if batch.position_ids is None else here(batch.position_ids)
        x = here(batch.tokens) if x is None else x
        return model(x, labels, mask, here(batch.positions), here(batch.samples), batch.document_starts, position_ids)

    def _backward(self, action: Action, received: list[Tensor]) -> None:
        kept = self.kept.pop(action._replace(kind="F"))
        queue = self.pipeline.weight_gradients
        queue.defers = action.kind == "I"
        self._before_gradients(action)
        kept.out.extend(received)
        received.clear()
        torch.autograd.backward(kept.begin, torch.ones_like(self.anchor))
        if queue.defers:
            self.deferred[action], queue.defers = queue.take(), False
        for dx in kept.x:
            self.messages.send(action, dx)

    def _weights(self, action: Action, received: list[Tensor]) -> None:
        self._before_gradients(action)
        compute(self.deferred.pop(action._replace(kind="I")))

    def _before_gradients(self, action: Action) -> None:
        self.pipeline.before_gradients(self.last_of[action.kind, action.stage] == action)
