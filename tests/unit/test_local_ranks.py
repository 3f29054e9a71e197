"""Ranks on this machine: results in rank order, a failure told with its traceback, and nobody left waiting."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksFailed, run_ranks


def _add(number: int) -> tuple[int, int, float, int]:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), number, total.item(), torch.get_num_threads()


def _one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like this")
    dist.barrier()  # waits for rank 1


def _one_dies() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def _hangs() -> None:
    time.sleep(60)


def test_results_in_rank_order() -> None:
    assert run_ranks(_add, 3, 7, threads=2) == [(rank, 7, 3.0, 2) for rank in range(3)]


def test_a_rank_that_raises() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1 does not like this") as caught:
        run_ranks(_one_fails, 2)
    assert "[rank 1] Traceback" in str(caught.value) and "_one_fails" in str(caught.value)
    assert time.monotonic() - began < 60, "the other rank must not wait for its time limit"


def test_a_rank_that_dies() -> None:
    with pytest.raises(RanksFailed, match=r"exit codes by rank \[3, "):
        run_ranks(_one_dies, 2)


def test_time_limit() -> None:
    with pytest.raises(RanksFailed, match=r"killed \[0\] \(time limit 1 s\)"):
        run_ranks(_hangs, 1, timeout=1)
