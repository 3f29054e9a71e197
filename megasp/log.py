"""Rank-aware logging and progress: rank 0 speaks, the others only warn.

On a terminal progress is a bar (tqdm); in a log file it is a plain line every few seconds.
"""

import logging
import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_LOGGER = logging.getLogger("megasp")


def rank() -> int:
    """This process's rank as its launcher set it (`RANK`), 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def setup(level: int = logging.INFO) -> None:
    """Send megasp's messages to stdout: all of rank 0's, warnings and errors of other ranks with their rank."""
    handler = _Stdout()
    prefix = "" if rank() == 0 else f"[rank {rank()}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level if rank() == 0 else logging.WARNING)
    _LOGGER.propagate = False


class _Stdout(logging.Handler):
    """Writes to what stdout is at the moment, flushed: a log file shows a line when it happens."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def info(message: str) -> None:
    """Tell the user something, once (rank 0 only)."""
    _LOGGER.info(message)


def warning(message: str) -> None:
    """Warn the user; said by whichever rank meets it."""
    _LOGGER.warning("warning: %s", message)


def progress(items: Iterable[T] | None, description: str, total: int | None = None, unit: str = "it") -> "tqdm[T]":
    """A tqdm over `items` (or over explicit `update(n)` calls when None), quiet except on rank 0.

    Without a terminal it prints at most one line every five seconds, so log files stay readable.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=terminal,
        disable=rank() != 0,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else 5.0,
    )


class _Lines:
    """A file that tqdm can redraw its bar on: each redraw becomes a line of its own on stdout."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line:
            sys.stdout.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()
