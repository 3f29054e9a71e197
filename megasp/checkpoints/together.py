"""What all ranks do together, and how a failure of one of them becomes the failure of all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megasp.parallel_state import ParallelState

T = TypeVar("T")


class Failed(Exception):
    """What went wrong, and on which ranks."""


def together(state: ParallelState, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `action` on every rank, and wait for all. Returns the results of all ranks on rank 0, nothing elsewhere.

    Args:
        group: of all ranks, to talk over; the world's own without it.
    Raises:
        Failed: on every rank, when any rank raised. Whatever it was: a rank that left alone would hang the others.
    """
    outcome: tuple[T | None, str | None]
    try:
        outcome = (action(), None)
    except OSError as error:
        outcome = (None, f"rank {state.rank}: {error.strerror or error} ({error.filename or 'while writing'})")
    except Exception as error:
        outcome = (None, f"rank {state.rank}: {error or type(error).__name__}")
    outcomes: list[Any] = [outcome] * (state.layout.world_size if state.rank == 0 else 0)
    if state.layout.world_size > 1:
        dist.gather_object(outcome, outcomes or None, dst=0, group=group)
    failure = from_rank_0(state, ", ".join(error for _, error in outcomes if error), group)
    if failure:
        raise Failed(failure)
    return [result for result, _ in outcomes]


def from_rank_0(state: ParallelState, value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    if state.layout.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
