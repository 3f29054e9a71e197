"""Saves the checkpoints of a run, in the background where asked: at most one is at work at any time.

    training thread   step 100 | save: start |  step 101: forward, backward | wait until copied | update | step 102 ...
    saver's thread                 copy out ........ done | write, hash, sync, publish .....................

Forward and backward only read what is saved; nothing changes before the optimizer's update. So the copy to host memory
overlaps them, and training stands still only for what of it is left then.
"""

import datetime
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megasp import log
from megasp.checkpoints.manifest import Shard
from megasp.checkpoints.safetensors_file import Entry
from megasp.checkpoints.writer import Content, Retention, write
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState


class Saver:
    """Writes one checkpoint after another. Every rank calls `save` and `wait` alike.

        with Saver("ckpt", state, background=True, optimizer=optimizer) as saver:
            saver.save(100, shards, metadata)
            ...                                  # training goes on
            error = saver.wait()                 # None: it is there

    Args:
        root: directory of checkpoints.
        background: `save` returns before the files are written. Costs the host's memory for a copy of what is saved.
        optimizer: its `step` waits until the tensors that it is about to change have been copied.
        timeout_minutes: how long ranks wait for each other in the background.
    """

    def __init__(
        self,
        root: Path | str,
        state: ParallelState,
        retention: Retention = Retention(),  # noqa: B008
        *,
        background: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        timeout_minutes: float = 10.0,
    ) -> None:
        self.root, self.state, self.retention, self.background = root, state, retention, background
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: CheckpointError | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._group = None
        if background and state.layout.world_size > 1:  # the world's own group is training's, in another thread
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
        if background and optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self.wait_until_copied())

    def save(self, step: int, shards: Sequence[Shard], metadata: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of one step; its outcome is that of the next `wait`.

        The shards' tensors may change as soon as `wait_until_copied` has returned.
        """
        assert self._thread is None, "wait for the save before"
        content = Content.of(shards, self.state.rank)
        if not self.background:
            self._run(step, lambda: content, metadata)
            return
        ready = torch.cuda.Event() if self.state.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        self._copied.clear()
        arguments = step, lambda: self._copy_out(content, ready), metadata
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def wait_until_copied(self) -> None:
        """Wait until nothing is read from the tensors that were given to `save`."""
        self._copied.wait()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed and no `wait` has told of it. Ranks may differ for a moment."""
        return self._error is not None

    def wait(self) -> CheckpointError | None:
        """Wait until no save is at work. Returns why the last one failed, the same on all ranks; None if it did not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self.wait()
        if failure is not None and kind is None:
            raise failure

    def _run(self, step: int, content: Callable[[], Content], metadata: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        try:
            directory = write(self.root, step, content, self.state, metadata, self.retention, self._group)
            how = " in the background" if self.background else ""
            log.info(f"saved {directory} in {time.perf_counter() - began:.1f} s{how}")
        except CheckpointError as error:
            self._error = error
        except Exception as error:
            if not self.background:
                raise
            rule = "the ranks must reach each other and end together"  # of this thread nobody else would hear
            self._error = CheckpointError(f"saving step {step} failed ({error!r})", rule, "save without --async-save")
        finally:
            self._copied.set()

    @torch.no_grad()
    def _copy_out(self, content: Content, ready: torch.cuda.Event | None) -> Content:
        """The same content in host memory. Buffers are kept from save to save: fresh pages cost more than the copy."""
        stream = torch.cuda.Stream(self.state.device) if ready is not None else None  # threads begin on device 0
        with torch.cuda.stream(stream):
            if stream is not None and ready is not None:
                stream.wait_event(ready)
            entries = {key: self._copied_entry(entry) for key, entry in content.entries.items()}
        if stream is not None:
            stream.synchronize()
        self._copied.set()
        return replace(content, entries=entries)

    def _copied_entry(self, entry: Entry) -> Entry:
        source = entry.read()
        buffer = self._buffers.get(entry.key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[entry.key] = buffer
        buffer.copy_(source, non_blocking=True)
        return replace(entry, read=lambda: buffer)
