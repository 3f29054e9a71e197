"""Profiles chosen steps of a run: PyTorch's profiler writes a trace, or CUDA's is switched on around them for nsys.

    nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop torchrun ... --profile
    pretrain_gpt.py ... --profile --use-pytorch-profiler --tensorboard-dir DIR     DIR/rank0.*.pt.trace.json

Traces of PyTorch open in Perfetto, chrome://tracing and TensorBoard.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import schedule, tensorboard_trace_handler

from megasp import log
from megasp.config.schema import Config


class Profiler(Protocol):
    """Is open while a run trains."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def step(self) -> None:
        """A step is over."""


def profiler(config: Config, rank: int, done: int) -> Profiler:
    """What profiles the steps that --profile chooses for this rank; without any it does nothing.

    Args:
        done: steps before this start of the run; steps that are over are not profiled.
    """
    options = config.profile
    steps = range(max(options.profile_step_start, done), options.profile_step_end)
    if options.profile and not steps:
        log.info(f"nothing to profile: step {options.profile_step_end} is over")
    if not options.profile or not steps or rank not in options.profile_ranks:
        return CudaProfiler(range(0), done)
    if not options.use_pytorch_profiler:
        return CudaProfiler(steps, done)
    before = steps.start - done
    warmup = min(1, before)  # of the profiler, whose first step is slow
    return torch.profiler.profile(
        schedule=schedule(wait=before - warmup, warmup=warmup, active=len(steps), repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(config.trace_folder), f"rank{rank}"),
        record_shapes=True,
        with_stack=True,
    )


class CudaProfiler:
    """Switches CUDA's profiler on for some steps, with an NVTX range around each operation.

    Args:
        steps: that are profiled, by the number of steps before each; none is for a rank that is not.
        done: steps before the first one.
    """

    def __init__(self, steps: range, done: int) -> None:
        self._steps, self._done, self._on = steps, done, ExitStack()

    def __enter__(self) -> Self:
        self._switch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._on.close()

    def step(self) -> None:
        """A step is over."""
        self._done += 1
        self._switch()

    def _switch(self) -> None:
        if self._done == self._steps.stop:
            self._on.close()
        elif self._steps and self._done == self._steps.start:
            self._on.enter_context(torch.cuda.profiler.profile())
            self._on.enter_context(emit_nvtx(record_shapes=True))
