"""Ranks on this machine without a launcher: `run_ranks(fn, world_size, *args)` runs `fn(*args)` on gloo ranks.

Ranks come from a forkserver that has torch and `fn` loaded, so eight of them start in a quarter of a second (spawned
ones take ten), meet over a file instead of a port, and are ended when one of them fails or the time is up.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD: tuple[str, ...] = (
    "torch",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.optim",
    "torch.testing",
    "torch.utils.checkpoint",
)
"""What the forkserver imports before the first ranks start, beside the module of their function."""


class RanksFailed(Exception):
    """Some ranks raised, died or did not end in time; holds their tracebacks."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, threads: int = 1) -> list[Any]:
    """Results of `fn(*args)` of each rank, in rank order; `fn` finds its process group initialized.

    Args:
        fn: an importable function; its arguments and result are pickled.
        timeout: seconds until ranks that have not ended are killed.
        threads: compute threads of each rank.
    Raises:
        RanksFailed: with the traceback of the ranks that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, fn.__module__])
    with tempfile.TemporaryDirectory(prefix="megasp-ranks-") as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, threads, timeout, fn, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, folder, timeout)
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(ranks: Sequence[ForkServerProcess], folder: Path, timeout: float) -> None:
    """Until all have ended well. When one fails the others get a moment to say why, then are killed."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.005)
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        ranks[rank].kill()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
        said = "\n".join(path.read_text() for path in errors)
        raise RanksFailed(f"exit codes by rank {codes}, killed {late} (time limit {timeout} s)\n{said}")


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    threads: int,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from megasp.process_group import use_loopback

    torch.set_num_threads(threads)
    use_loopback()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", f"file://{folder}/store", limit, world_size, rank)
    try:
        (folder / f"result{rank}").write_bytes(pickle.dumps(fn(*args)))
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}").write_text(f"[rank {rank}] {traceback.format_exc()}")
        os._exit(1)  # without waiting for peers that wait for us
    dist.destroy_process_group()
