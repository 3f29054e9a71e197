"""When to save and stop before the last step: on a signal, at a step, after a time."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

_PROGRAM_START = time.monotonic()  # near enough: before data and model are built
_INTERVAL, _DURATION, _SIGNAL, _SAVE = 1, 2, 3, 1000  # a signal's code is _SIGNAL plus its number


class StopConditions:
    """Asks after each step whether to save and stop; all ranks get the same answer.

    A batch system's SIGTERM, or SIGUSR1 as `sbatch --signal=USR1@300` sends it before the time is over, ends the
    run after the current step instead of killing it. The handlers of before are put back on leaving the block.
    torchrun kills its ranks 30 seconds after it passed a signal on (`--shutdown-timeout`, where it has that, sets
    another time), and passes SIGUSR1 on only with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`; srun does neither.

        with StopConditions(exit_interval=1000, device=device) as stop:
            for step in range(start_step + 1, train_steps + 1):
                train_step()
                if reason := stop.reason(step):
                    save()
                    break

    Args:
        exit_interval: stop when the number of finished steps is a multiple of it.
        exit_duration_in_mins: stop when so many minutes have passed since the program started.
        device: where ranks compare, "cuda" with NCCL.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(
        self,
        *,
        exit_interval: int | None = None,
        exit_duration_in_mins: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._exit_interval, self._minutes, self._device = exit_interval, exit_duration_in_mins, device
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not set from Python, and only C could put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def reason(self, step: int, save_failed: bool = False) -> str | None:
        """Why to stop after `step` finished steps, in words; None to go on. Every rank calls it after each step.

        Args:
            save_failed: a save in the background failed, and must not; ranks may learn of it at different steps.
        """
        code = _SAVE if save_failed else self._code(step)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Signals and clocks reach ranks at different steps: the largest code of any rank counts for all.
            codes = torch.tensor(code, device=self._device)
            dist.all_reduce(codes, dist.ReduceOp.MAX)
            code = int(codes)
        if code == 0:
            return None
        if code == _INTERVAL:
            return f"step {step} is a multiple of --exit-interval {self._exit_interval}"
        if code == _DURATION:
            return f"the {self._minutes:g} minutes of --exit-duration-in-mins are over"
        if code == _SAVE:
            return "a checkpoint could not be written (--exit-on-save-error)"
        return f"a rank received {signal.Signals(code - _SIGNAL).name}"

    def _code(self, step: int) -> int:
        """What this rank sees."""
        if self._received:
            return _SIGNAL + self._received
        if self._minutes is not None and time.monotonic() - _PROGRAM_START > self._minutes * 60:
            return _DURATION
        return _INTERVAL if self._exit_interval and step % self._exit_interval == 0 else 0
