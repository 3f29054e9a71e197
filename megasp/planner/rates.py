"""Seconds of one operation on one GPU: a matrix product, attention, a pass over memory, a collective.

A roofline with what was measured in place of the datasheet: the best rates of the hardware table, times the few global
coefficients of `Coefficients`, which were fitted once over many stacks (docs/planner.md)
and belong to none of them.
"""

from dataclasses import dataclass
from math import ceil

from megasp.planner.hardware import Hardware

TILE_ROWS, TILE_COLUMNS = 128, 256
"""The part of a matrix product that one multiprocessor computes at a time, in today's libraries."""

HOP_SECONDS = 8e-6
"""One step of a ring between nodes: 4 nodes of B200 take 488 us longer for 64 MiB than their bandwidth says, in 62."""

ATTENTION_ALIASES = {"flash-attn-2": "flash"}
"""Kernels by other names than in the hardware tables; one without a table there is taken for flash."""

LAUNCH_SECONDS = 1e-5
"""A collective's start inside a node."""


@dataclass(frozen=True)
class Coefficients:
    """Everything that was fitted to published results.

    Attributes:
        matmul: share of the best measured matmul rate that a step sustains: power limits clocks, and neighbours
            compete for caches.
        attention: the same for the attention kernels' measured rates.
        memory: share of the copy rate that element-wise kernels reach.
        unfused: memory traffic of element-wise work that is not fused, as a multiple of the fused.
        layer_seconds: time of a layer and direction in which the GPU starts kernels, waits, or does what is not
            counted.
        step_seconds: time of a step outside of its microbatches.
        network: share of the line rate that collectives between nodes reach.
        contention: how much compute slows for each second that communication runs behind it.
        hidden_tensor: share of tensor-parallel communication that the GEMMs beside it hide, where software overlaps it.
    """

    matmul: float = 0.82
    attention: float = 0.93
    memory: float = 0.92
    unfused: float = 1.7
    layer_seconds: float = 85e-6
    step_seconds: float = 28e-3
    network: float = 0.82
    contention: float = 0.27
    hidden_tensor: float = 0.7


COEFFICIENTS = Coefficients()


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: how many, and how far apart neighbours are in rank numbers."""

    size: int
    stride: int

    def inside(self, hardware: Hardware) -> int:
        """How many of them are on one node."""
        return max(1, min(self.size, hardware.node_gpus // self.stride))

    def crosses(self, hardware: Hardware) -> bool:
        """Whether they are on several nodes."""
        return self.inside(hardware) < self.size


@dataclass(frozen=True)
class Rates:
    """Times of operations on one kind of GPU."""

    hardware: Hardware
    fit: Coefficients = COEFFICIENTS

    def matmul(self, m: float, n: float, k: float, precision: str = "bf16") -> float:
        """An [m, k] x [k, n] product. Its last wave of tiles is half empty; thin ones are bound by memory."""
        tiles = ceil(m / TILE_ROWS) * ceil(n / TILE_COLUMNS)
        tail = 1 + 0.5 * self.hardware.sms / tiles
        seconds = 2 * m * n * k * tail / (self.hardware.matmul[precision] * self.fit.matmul)
        item = 1 if precision == "fp8" else 2
        return max(seconds, self.memory(item * k * (m + n) + 2 * m * n))

    def attention(self, kernel: str, flops: float, backward: bool, head_dim: int, length: float) -> float:
        """Fused attention of so many FLOPs (the causal half) over sequences of `length` keys."""
        tables = self.hardware.attention
        rates = tables.get(ATTENTION_ALIASES.get(kernel, kernel)) or tables["flash"]
        return flops / (rates.rate(backward, head_dim, length) * self.fit.attention)

    def memory(self, size: float) -> float:
        """A kernel that reads and writes so many bytes in all."""
        return size / (self.hardware.memory_rate * self.fit.memory)

    def host(self, size: float) -> float:
        """A copy to or from the host, all GPUs of a node at once."""
        return size / self.hardware.host_rate

    def network(self, senders: int = 1, ports_each: float = 1.0) -> float:
        """Bytes a second to other nodes of each of `senders` on a node that send at once, over so many ports each."""
        hardware = self.hardware
        return hardware.network_rate * self.fit.network * min(ports_each, hardware.ports / senders)

    def bus_rate(self, group: Group, size: float, reduce_all: bool = False) -> float:
        """NCCL's bus bandwidth of a ring collective: bytes that each rank sends, by its time."""
        inside = self.hardware.all_reduce(size)
        fast = inside if reduce_all else min(inside, self.hardware.gather_rate)
        if not group.crosses(self.hardware):
            return fast
        rings = min(group.stride, self.hardware.node_gpus)  # each can use the ports of all its members on a node
        return min(fast, self.network(rings, group.inside(self.hardware)))

    def collective(self, group: Group, size: float, kind: str = "gather") -> float:
        """A collective whose whole tensor has `size` bytes.

        Args:
            kind: gather (or reduce-scatter, which takes as long), reduce (all-reduce), exchange (all-to-all of `size`
                bytes on each rank).
        """
        if group.size == 1 or not size:
            return 0.0
        crosses = group.crosses(self.hardware)
        share = (group.size - 1) / group.size
        if kind == "exchange":
            inside = (
                size
                * (group.inside(self.hardware) - 1)
                / group.size
                / min(self.hardware.all_reduce(size), self.hardware.gather_rate)
            )
            outside = size * (group.size - group.inside(self.hardware)) / group.size / self.network(self.senders)
            return max(inside, outside) + LAUNCH_SECONDS * (1 + crosses)
        rounds = 2 if kind == "reduce" else 1
        start = rounds * (group.size - 1) * HOP_SECONDS if crosses else LAUNCH_SECONDS
        return rounds * size * share / self.bus_rate(group, size, kind == "reduce") + start

    @property
    def senders(self) -> int:
        """GPUs of a node that send to others where all do."""
        return self.hardware.node_gpus

    def message(self, size: float, distance: int, size_of_axis: int = 2) -> float:
        """A tensor from one rank to the next one on an axis, `distance` away; all ranks of the node's edge send."""
        group = Group(size_of_axis, distance)
        if not group.crosses(self.hardware):
            return size / self.hardware.gather_rate + LAUNCH_SECONDS
        return size / self.network(min(distance, self.hardware.node_gpus)) + HOP_SECONDS
