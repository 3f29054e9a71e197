"""The rank grid: one frozen `ParallelState`, built once from a frozen `Layout` on PyTorch's DeviceMesh.

Modules get the `Axis` that they communicate on through their constructors. Scripts may use the module-level functions,
which carry Megatron-LM's names:

    from megasp import parallel_state
    state = parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, ulysses_size=2)
    parallel_state.get_tensor_model_parallel_rank()
    parallel_state.destroy_model_parallel()
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megasp.config.layout import AXES, UNIONS, Layout
from megasp.errors import ConfigError
from megasp.process_group import inherit_timeout, initialize_distributed

__all__ = ["Axis", "Layout", "ParallelState", "Traffic", "initialize_model_parallel"]


@dataclass
class Traffic:
    """What this rank has sent over one axis: operation -> calls and bytes (own share not counted)."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes_sent: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, bytes_sent: int) -> None:
        self.calls[operation] = self.calls.get(operation, 0) + 1
        self.bytes_sent[operation] = self.bytes_sent.get(operation, 0) + bytes_sent

    def add_all(self, other: "Traffic", times: int = 1) -> None:
        """Add everything of `other`, `times` times."""
        for operation, calls in other.calls.items():
            self.calls[operation] = self.calls.get(operation, 0) + times * calls
            self.bytes_sent[operation] = self.bytes_sent.get(operation, 0) + times * other.bytes_sent[operation]

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_sent.values())

    def reset(self) -> None:
        self.calls.clear()
        self.bytes_sent.clear()


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis (or union of axes) of the grid, and the group of ranks along it.

    An axis of one rank has no group; every collective over it is the identity.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)


@dataclass(frozen=True)
class ParallelState:
    """Every group of this rank. Axes: tp, ulysses, ring, dp_inner, dp_outer, pp; unions: cp, dp, dp_cp,
    dp_outer_dp_cp (ranks over which gradients are summed), pp_tp (ranks that split one replica of the model).

    `ends` are the first and the last pipeline rank, which share a tied embedding; one rank elsewhere. `links` are for
    messages between neighbours on pp: (from, to) -> an axis of those two ranks, for each direction one. A rank only
    sends on a link or only receives, so a receive that is posted early holds nothing else up.
    """

    layout: Layout
    rank: int
    device: torch.device
    axes: dict[str, Axis]
    mesh: DeviceMesh | None = None
    ends: Axis = field(default_factory=lambda: Axis("ends"))
    links: dict[tuple[int, int], Axis] = field(default_factory=dict)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "ParallelState":
        """The state of one process without process groups."""
        axes = {name: Axis(name) for name in (*AXES, *UNIONS)}
        return cls(Layout(), 0, torch.device(device), axes)

    @property
    def tp(self) -> Axis:
        return self.axes["tp"]

    @property
    def pp(self) -> Axis:
        return self.axes["pp"]

    @property
    def ulysses(self) -> Axis:
        return self.axes["ulysses"]

    @property
    def ring(self) -> Axis:
        return self.axes["ring"]

    @property
    def cp(self) -> Axis:
        """Ranks that share a sequence; the rank on it indexes the shard map."""
        return self.axes["cp"]

    @property
    def dp(self) -> Axis:
        """Ranks that train on different samples."""
        return self.axes["dp"]

    @property
    def gradients(self) -> Axis:
        """Ranks whose gradients are summed: dp_outer x dp_inner x ring x ulysses."""
        return self.axes["dp_outer_dp_cp"]

    @property
    def model(self) -> Axis:
        """Ranks that together hold one replica of the model: pp x tp."""
        return self.axes["pp_tp"]


_STATE: ParallelState | None = None


def build(layout: Layout, device: torch.device) -> ParallelState:
    """The state of this rank of the initialized process group. Every rank calls it with the same layout.

    Raises:
        ConfigError: the layout does not multiply to the world size.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if layout.world_size != world_size:
        raise ConfigError(
            f"layout {layout.name} on {world_size} ranks",
            f"its sizes multiply to {layout.world_size}, which must be the number of ranks",
            f"start {layout.world_size} ranks, or change a size",
        )
    if world_size == 1:
        return ParallelState.single(device)
    mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES)
    index = layout.coordinates(rank)
    axes = {name: _axis(name, mesh[name], index[name]) for name in AXES}
    for union, parts in UNIONS.items():
        # The mesh that `_flatten` returns is kept: looking it up by name is deprecated.
        axes[union] = _axis(union, mesh[parts]._flatten(union), layout.group(parts, rank).index(rank))
    ends = _pair(layout, "ends", (0, layout.pp - 1), Traffic()) or Axis("ends")
    neighbours = {(a, b % layout.pp) for a in range(layout.pp) for b in (a - 1, a + 1)}
    # What is sent counts as traffic of pp.
    pairs = {pair: _pair(layout, "pp", pair, axes["pp"].traffic) for pair in sorted(neighbours)}
    links = {pair: axis for pair, axis in pairs.items() if axis}
    inherit_timeout([axis.group for axis in (*axes.values(), ends, *links.values()) if axis and axis.group], device)
    return ParallelState(layout, rank, device, axes, mesh, ends, links)


def _axis(name: str, mesh: DeviceMesh, rank: int) -> Axis:
    if mesh.size() == 1:
        return Axis(name)
    assert mesh.get_local_rank() == rank, (name, mesh, rank)
    return Axis(name, mesh.size(), rank, mesh.get_group())


def _pair(layout: Layout, name: str, pair: tuple[int, int], traffic: Traffic) -> Axis | None:
    """An axis of two ranks of each pipeline, by their index on pp; None on ranks that are not of them."""
    if pair[0] == pair[1]:
        return None
    pipelines = [layout.group(("pp",), rank) for rank in range(layout.world_size // layout.pp)]
    group, _ = dist.new_subgroups_by_enumeration([sorted(ranks[at] for at in pair) for ranks in pipelines])
    return Axis(name, 2, dist.get_rank(group), group, traffic) if group is not None else None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    ulysses_size: int = 1,
    ring_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
) -> ParallelState:
    """Build the rank grid of this process and keep it for the accessors below; data parallelism takes what is left.

    Joins the process group first where that has not happened. Returns the state, which is also `get_parallel_state()`.

    Raises:
        ConfigError: the sizes do not divide the number of ranks, or the state exists already.
    """
    global _STATE
    if _STATE is not None:
        raise ConfigError(
            "initialize_model_parallel called twice",
            "there is one rank grid per process",
            "call destroy_model_parallel() first",
        )
    device = initialize_distributed(backend, timeout_minutes)
    world_size = dist.get_world_size()
    replicas = num_distributed_optimizer_instances
    ranks = tensor_model_parallel_size * pipeline_model_parallel_size * ulysses_size * ring_size * replicas
    if ranks < 1 or world_size % ranks:
        raise ConfigError(
            f"tensor {tensor_model_parallel_size} x pipeline {pipeline_model_parallel_size} x Ulysses {ulysses_size} "
            f"x ring {ring_size} x optimizer instances {replicas} on {world_size} ranks",
            "the product must divide the number of ranks",
            f"start a multiple of {max(ranks, 1)} ranks",
        )
    layout = Layout(
        pipeline_model_parallel_size, replicas, world_size // ranks, ring_size, ulysses_size, tensor_model_parallel_size
    )
    _STATE = build(layout, device)
    return _STATE


def destroy_model_parallel() -> None:
    """Forget the rank grid and leave the process group; `initialize_model_parallel` may be called again."""
    global _STATE
    _STATE = None
    if dist.is_initialized():
        dist.destroy_process_group()


def model_parallel_is_initialized() -> bool:
    return _STATE is not None


def get_parallel_state() -> ParallelState:
    """The state of this process."""
    if _STATE is None:
        raise ConfigError("no rank grid", "it is built before it is used", "call initialize_model_parallel() first")
    return _STATE


def get_tensor_model_parallel_group() -> dist.ProcessGroup | None:
    return get_parallel_state().tp.group


def get_tensor_model_parallel_rank() -> int:
    return get_parallel_state().tp.rank


def get_tensor_model_parallel_world_size() -> int:
    return get_parallel_state().tp.size


def get_pipeline_model_parallel_group() -> dist.ProcessGroup | None:
    return get_parallel_state().pp.group


def get_pipeline_model_parallel_rank() -> int:
    return get_parallel_state().pp.rank


def get_pipeline_model_parallel_world_size() -> int:
    return get_parallel_state().pp.size


def get_data_parallel_group() -> dist.ProcessGroup | None:
    return get_parallel_state().dp.group


def get_data_parallel_rank() -> int:
    return get_parallel_state().dp.rank


def get_data_parallel_world_size() -> int:
    return get_parallel_state().dp.size


def get_context_parallel_group() -> dist.ProcessGroup | None:
    return get_parallel_state().cp.group


def get_context_parallel_rank() -> int:
    return get_parallel_state().cp.rank


def get_context_parallel_world_size() -> int:
    return get_parallel_state().cp.size


def get_ulysses_group() -> dist.ProcessGroup | None:
    return get_parallel_state().ulysses.group


def get_ulysses_rank() -> int:
    return get_parallel_state().ulysses.rank


def get_ulysses_world_size() -> int:
    return get_parallel_state().ulysses.size


def get_ring_group() -> dist.ProcessGroup | None:
    return get_parallel_state().ring.group


def get_ring_rank() -> int:
    return get_parallel_state().ring.rank


def get_ring_world_size() -> int:
    return get_parallel_state().ring.size
