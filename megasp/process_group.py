"""Joining the process group: from a launcher's variables, or alone; over the interface that works."""

import datetime
import os
import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megasp.errors import ConfigError


def initialize_distributed(backend: str | None = None, timeout_minutes: float = 10.0) -> torch.device:
    """Join the process group that the launcher describes (torchrun's variables), or make one of a single process.

    Args:
        backend: "nccl" or "gloo"; nccl where there are GPUs without it.
    Returns:
        This rank's device.
    """
    _check_launcher()
    use_cuda = torch.cuda.is_available() and backend != "gloo"
    device = torch.device("cuda", _gpu()) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    elif backend == "nccl":
        raise ConfigError("--distributed-backend nccl", "it needs CUDA devices and this machine has none", "use gloo")
    if dist.is_initialized():
        return device
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = backend or ("nccl" if use_cuda else "gloo")
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and not use_cuda:
        use_loopback()
    dist.init_process_group(backend, timeout=timeout, device_id=device if use_cuda else None)
    return device


def _check_launcher() -> None:
    """Refuse several processes that do not know of each other: each would train alone and write the same files."""
    for launcher, size in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        processes = int(os.environ.get(size, "1"))
        if processes > 1 and "RANK" not in os.environ:
            raise ConfigError(
                f"{processes} processes of {launcher} without RANK",
                "ranks find each other by the variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
                f"let {launcher} start one torchrun on each node (examples/ has scripts), or export these variables",
            )


def _gpu() -> int:
    """This rank's GPU on its node."""
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"local rank {index} on a node with {count} GPUs", "each rank needs its own", f"start {count} ranks a node"
        )
    return index


def ranks_of_node() -> int | None:
    """Ranks that the launcher started on this machine; None where it does not say."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else None


def check_nodes_agree(ranks: int, device: torch.device) -> None:
    """Refuse a split of the ranks that they chose by nodes of different sizes: groups would not match, and hang."""
    most = torch.tensor([ranks, -ranks], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    high, low = int(most[0]), -int(most[1])
    if high != low:
        raise ConfigError(
            f"nodes of {low} to {high} ranks",
            "the split of the context-parallel ranks weighs it, and must be one",
            "give --nproc-per-node, or --ulysses-size and --ring-size",
        )


def use_loopback() -> None:
    """Let gloo talk over the loopback interface, when all ranks are on this host and nobody chose an interface.

    Without it gloo looks the host's own name up, which fails or finds a dead interface in many containers.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def leave(failed: bool) -> None:
    """Leave the process group, at the end of a run or because it failed.

    A rank that failed leaves NCCL's to the end of its process: destroying it waits for collectives in which the other
    ranks wait for this one, and hides the error until the time limit.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def inherit_timeout(groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
    """Give groups the world's timeout; PyTorch gives new ones its own default. (Its private names stand here alone.)"""
    if dist.get_backend() not in ("gloo", "nccl"):
        return
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(device).options._timeout
    for group in groups:
        distributed_c10d._set_pg_timeout(timeout, group)
