"""Ranks for tests: `run_ranks(fn, world_size, *args)` runs `fn(*args)` on gloo ranks and returns their results.

Ranks come from a forkserver that has torch loaded, so eight of them start in a quarter of a second.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.testing",
    "torch.optim",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
    "tests.ranks",
    "megasp.parallel_state",
    "megasp.config",
]
TIMEOUT_SECONDS = 120


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Results of `fn(*args)` on each rank, in rank order; `fn` finds its process group initialized.

    Raises:
        AssertionError: with the traceback of every rank that failed, or the ranks that did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank_main, args=(r, world_size, folder, fn, args)) for r in range(world_size)]
        for process in processes:
            process.start()
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        for process in processes:
            process.join(max(0.0, (deadline - datetime.datetime.now()).total_seconds()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        errors = [path.read_text() for rank in range(world_size) if (path := Path(folder, f"error{rank}")).exists()]
        died = [(rank, process.exitcode) for rank, process in enumerate(processes) if process.exitcode not in (0, 1)]
        assert not errors and not late and not died, f"late ranks {late}, exit codes {died}\n" + "\n".join(errors)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from megasp.parallel_state import use_loopback

    torch.set_num_threads(1)
    use_loopback()
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    store = f"file://{folder}/store"
    limit = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        result = fn(*args)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"[rank {rank}] {traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()
