"""The rank grid as a library, in one process without a launcher: built, asked, destroyed, built again."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megasp import parallel_state, process_group
from megasp.config.layout import AXES, UNIONS
from megasp.errors import ConfigError
from megasp.parallel_state import Axis, Layout, ParallelState, Traffic

ACCESSORS = ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel", "context_parallel", "ulysses", "ring")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    parallel_state.destroy_model_parallel()
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_built_destroyed_and_built_again() -> None:
    for _ in range(2):
        state = parallel_state.initialize_model_parallel(backend="gloo")
        assert parallel_state.model_parallel_is_initialized() and parallel_state.get_parallel_state() is state
        assert dist.get_world_size() == 1 and state.device.type == "cpu"
        total = torch.tensor([3.0])
        dist.all_reduce(total)  # the process group works
        assert total.item() == 3 and state.layout == Layout() and state.mesh is None
        parallel_state.destroy_model_parallel()
        assert not parallel_state.model_parallel_is_initialized()


def test_destroy_without_a_grid() -> None:
    parallel_state.destroy_model_parallel()


def test_accessors_carry_megatrons_names() -> None:
    state = parallel_state.initialize_model_parallel(backend="gloo")
    for name in ACCESSORS:
        assert getattr(parallel_state, f"get_{name}_rank")() == 0, name
        assert getattr(parallel_state, f"get_{name}_world_size")() == 1, name
        assert getattr(parallel_state, f"get_{name}_group")() is None, name
    assert state.axes.keys() == {*AXES, *UNIONS}


@pytest.mark.parametrize("kind", ["rank", "world_size", "group"])
@pytest.mark.parametrize("name", ACCESSORS)
def test_accessors_read_their_own_axis(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every axis has another size and rank, so an accessor of the wrong axis is seen."""
    axes = {axis: Axis(axis, 100 + i, i + 1, object()) for i, axis in enumerate((*AXES, *UNIONS))}  # type: ignore[arg-type]
    state = ParallelState(Layout(), 0, torch.device("cpu"), axes)
    monkeypatch.setattr(parallel_state, "_STATE", state)
    own = {"tensor_model_parallel": "tp", "pipeline_model_parallel": "pp", "data_parallel": "dp"}
    own |= {"context_parallel": "cp", "ulysses": "ulysses", "ring": "ring"}
    got = getattr(parallel_state, f"get_{name}_{kind}")()
    assert got == getattr(axes[own[name]], "size" if kind == "world_size" else kind)
    assert (state.gradients.name, state.model.name, state.dp.name) == ("dp_outer_dp_cp", "pp_tp", "dp")


def test_asked_before_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"no rank grid: .*; call initialize_model_parallel\(\) first"):
        parallel_state.get_tensor_model_parallel_rank()


def test_built_twice() -> None:
    state = parallel_state.initialize_model_parallel(backend="gloo")
    with pytest.raises(ConfigError, match=r"called twice: .* call destroy_model_parallel\(\) first"):
        parallel_state.initialize_model_parallel(backend="gloo")
    assert parallel_state.get_parallel_state() is state


def test_sizes_that_do_not_fit_and_then_do() -> None:
    with pytest.raises(ConfigError, match=r"tensor 2 x pipeline 1 x Ulysses 3 .* on 1 ranks: .* a multiple of 6 ranks"):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, ulysses_size=3, backend="gloo")
    with pytest.raises(ConfigError):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=0, backend="gloo")
    with pytest.raises(ConfigError):
        parallel_state.initialize_model_parallel(-1, -1, backend="gloo")
    assert parallel_state.initialize_model_parallel(backend="gloo").layout.world_size == 1


def test_layout_of_another_size() -> None:
    device = parallel_state.initialize_distributed("gloo")
    with pytest.raises(ConfigError, match=r"layout tp2-.* on 1 ranks: its sizes multiply to 2.*; start 2 ranks"):
        parallel_state.build(Layout(tp=2), device)


def test_joins_a_group_that_exists() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    parallel_state.initialize_model_parallel(backend="gloo")
    assert dist.group.WORLD is group


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_nccl_without_gpus() -> None:
    with pytest.raises(ConfigError, match=r"--distributed-backend nccl: it needs CUDA devices .* use gloo"):
        parallel_state.initialize_model_parallel(backend="nccl")
    assert not dist.is_initialized()


def test_single_needs_no_process_group() -> None:
    state = ParallelState.single()
    assert not dist.is_initialized() and state.axes.keys() == {*AXES, *UNIONS}
    assert all((axis.size, axis.rank, axis.group) == (1, 0, None) for axis in state.axes.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.rank = 1  # type: ignore[misc]


def test_loopback_is_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface that the user named stays."""
    monkeypatch.setattr(process_group.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    process_group.use_loopback()
    assert process_group.os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    process_group.use_loopback()
    assert process_group.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(process_group.socket, "if_nameindex", lambda: [(2, "eth0")])
    process_group.use_loopback()
    assert "GLOO_SOCKET_IFNAME" not in process_group.os.environ


def test_traffic() -> None:
    traffic = Traffic()
    traffic.add("all_gather", 10)
    traffic.add("all_gather", 5)
    traffic.add("all_reduce", 1)
    assert traffic.calls == {"all_gather": 2, "all_reduce": 1} and traffic.bytes_sent["all_gather"] == 15
    assert (traffic.total_calls, traffic.total_bytes) == (3, 16)
    traffic.reset()
    assert (traffic.total_calls, traffic.total_bytes) == (0, 0)
    assert Axis("a").traffic is not Axis("a").traffic, "every axis counts for itself"


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [("srun", {"SLURM_STEP_NUM_TASKS": "8"}), ("mpirun", {"OMPI_COMM_WORLD_SIZE": "8"})],
)
def test_processes_that_do_not_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch, launcher: str, variables: dict[str, str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"8 processes of {launcher} without RANK.*torchrun"):
        parallel_state.initialize_distributed("gloo")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process_group.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="local rank 4 on a node with 4 GPUs"):
        parallel_state.initialize_distributed()


@pytest.mark.parametrize(("backend", "failed", "left"), [("gloo", True, 1), ("nccl", False, 1), ("nccl", True, 0)])
def test_a_failed_rank_does_not_wait_for_nccl(
    backend: str, failed: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed: list[bool] = []
    with monkeypatch.context() as patched:
        patched.setattr(dist, "is_initialized", lambda: True)
        patched.setattr(dist, "get_backend", lambda: backend)
        patched.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
        process_group.leave(failed)
    assert len(destroyed) == left
