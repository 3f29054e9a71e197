"""When a run saves, and what a save that fails means for it."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from megasp import log
from megasp.checkpoints import Retention, Saver
from megasp.data.phases import Phase
from megasp.training import resume
from megasp.training.build import Training
from megasp.training.resume import Progress


class Checkpoints:
    """The checkpoints that a run writes, by its flags; none without --save.

    A save that fails is a warning, and training goes on to the next one; or it ends the run (--exit-on-save-error).
    The last one of a run must succeed: else it would seem to be kept.

    Args:
        saved: the step of the checkpoint that the run goes on from.
    """

    def __init__(self, training: Training, phases: Sequence[Phase], saved: int) -> None:
        self.training, self.phases, self.saved = training, phases, saved
        options = training.config.checkpoint
        self.interval, self.must_succeed = options.save_interval, options.exit_on_save_error
        self._trying = saved
        self._saver: Saver | None = None
        if options.save:
            self._saver = Saver(
                options.save,
                training.state,
                Retention(options.keep_last, options.keep_every),
                background=options.async_save,
                optimizer=training.optimizer.parts[0],
                timeout_minutes=training.config.parallel.distributed_timeout_minutes,
            )

    def after_step(self, progress: Progress, last: bool) -> None:
        """Save if it is time to, or if this step is the `last`; and tell of a save that has failed meanwhile.

        Raises:
            CheckpointError: a save failed, and must not. All ranks raise it.
        """
        if self._saver is None:
            return
        if last or (self.interval and progress.step % self.interval == 0):
            self._settle(self.must_succeed)  # one at a time
            if progress.step != self.saved:
                self._trying = progress.step
                resume.save(self.training, progress, self.phases, self._saver)
                if last or not self._saver.background:
                    self._settle(last or self.must_succeed)
        elif self._saver.failed and not self.must_succeed:
            self._settle(False)

    @property
    def failed(self) -> bool:
        """Whether the run must end because a save in the background failed. Ranks may differ for a moment."""
        return self._saver is not None and self.must_succeed and self._saver.failed

    def _settle(self, must_succeed: bool) -> None:
        """Wait for the save at work, and take its outcome."""
        assert self._saver is not None
        error = self._saver.wait()
        if error is None:
            self.saved = self._trying
            return
        self._trying = self.saved
        if must_succeed:
            raise error
        if self.training.state.rank == 0:
            log.warning(f"{error} Training goes on without it; --exit-on-save-error would have ended the run.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saver is not None:
            self._saver.__exit__(kind, error, trace)
