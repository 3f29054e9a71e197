"""Any call to the operating system may fail while a checkpoint is saved: the error is told in a sentence, and a good
checkpoint is there at every moment, also where only one is kept."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasp.checkpoints import Retention, Saver, load, newest_good
from megasp.checkpoints.verify import damage
from megasp.parallel_state import ParallelState
from tests.unit.checkpoints.cases import mismatches, save_one, shards

SINGLE = ParallelState.single()
CALLS = ("pwrite", "fsync", "mkdir", "rename", "replace", "rmdir")


class Fault:
    """Makes one call of many fail, counted from 0 over all of `CALLS`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
        self.number, self.code, self.count = number, code, itertools.count()
        self.met = False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **keywords: Any) -> Any:
            if next(self.count) == self.number:
                self.met = True
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **keywords)

        return failing


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_any_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, code: int) -> None:
    save_one(tmp_path, 1)
    told = 0
    with Saver(tmp_path, SINGLE, Retention(last=1), background=background) as saver:
        for number in itertools.count():
            with monkeypatch.context() as patched:
                fault = Fault(patched, number, code)
                saver.save(number + 2, shards(1, 0), {})
                error = saver.wait()
            if error is not None:
                assert fault.met and os.strerror(code) in str(error) and "check the space and permissions" in str(error)
                told += 1
            good = newest_good(tmp_path, SINGLE)
            assert good is not None and damage(good) == []
            assert error is not None or good.name == f"step_{number + 2:08d}"
            if not fault.met:
                break
    assert told > len(CALLS), "nothing failed: the test shows nothing"
    held = shards(1, 0, fill=False)
    load(tmp_path, held)
    assert list(mismatches(held)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", good.name]
