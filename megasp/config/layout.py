"""A parallel layout: how many ranks each axis of the rank grid has, its name, and the arithmetic of ranks.

    rank = ((((pp * DPO + dp_outer) * DPI + dp_inner) * R + ring) * U + ulysses) * T + tp
    world_size = P * DPO * DPI * R * U * T

So tensor-parallel ranks are neighbours (fastest links) and pipeline stages are furthest apart. With tp2-u2-dp2:

    rank         0  1  2  3  4  5  6  7
    tp           0  1  0  1  0  1  0  1
    ulysses      0  0  1  1  0  0  1  1
    dp_inner     0  0  0  0  1  1  1  1
"""

import itertools
import math
import re
from dataclasses import dataclass

from megasp.errors import ConfigError

AXES = ("pp", "dp_outer", "dp_inner", "ring", "ulysses", "tp")
"""Axes of the rank grid, slowest first."""

UNIONS = {
    "cp": ("ring", "ulysses"),
    "dp": ("dp_outer", "dp_inner"),
    "dp_cp": ("dp_inner", "ring", "ulysses"),
    "dp_outer_dp_cp": ("dp_outer", "dp_inner", "ring", "ulysses"),
    "pp_tp": ("pp", "tp"),
}
"""Unions of axes that get a group of their own: who splits a sequence, who holds other samples, who shards the
optimizer, who sums gradients, who splits one model replica."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. `dp_outer` replicates what `dp_inner` may shard; plain data parallelism is `dp_inner`.

    `zero` says what dp_inner x cp shards: 1 optimizer states, 2 gradients, too, 3 weights, too; 0 nothing.
    """

    pp: int = 1
    dp_outer: int = 1
    dp_inner: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(
                    f"layout axis {axis} is {getattr(self, axis)}", "every axis has at least one rank", "use 1"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def dp(self) -> int:
        return self.dp_outer * self.dp_inner

    @property
    def cp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def name(self) -> str:
        """`tp2-pp1-u2-r1-dp1`; hybrid sharding adds `-dpo2`, its outer size, and ZeRO `-zero1`, its stage."""
        outer = f"-dpo{self.dp_outer}" if self.dp_outer > 1 else ""
        zero = f"-zero{self.zero}" if self.zero else ""
        return f"tp{self.tp}-pp{self.pp}-u{self.ulysses}-r{self.ring}-dp{self.dp}{outer}{zero}"

    @classmethod
    def parse(cls, name: str) -> "Layout":
        """Read a layout name; sizes of one may be left out, and any order is read.

        Raises:
            ConfigError: a part that is not tp, pp, u, r, dp, dpo or zero and a number, or one given twice.
        """
        sizes: dict[str, int] = {}
        for part in name.split("-"):
            match = re.fullmatch(r"(tp|pp|u|r|dp|dpo|zero)(\d+)", part)
            if match is None or match[1] in sizes:
                raise ConfigError(
                    f"layout name {name!r}, part {part!r}",
                    "a layout is tp, pp, u (Ulysses), r (ring), dp, dpo (outer replicas), each once with its size, and "
                    "zero with its stage",
                    "write for example tp2-u2 or tp2-pp2-u2-r1-dp2-zero1",
                )
            sizes[match[1]] = int(match[2])
        outer, dp = sizes.get("dpo", 1), sizes.get("dp", sizes.get("dpo", 1))
        if outer < 1:
            raise ConfigError(f"layout name {name!r}", "dpo must be at least 1", "leave dpo out")
        if dp % outer:
            raise ConfigError(
                f"layout name {name!r}",
                f"dpo ({outer}) must divide dp ({dp})",
                f"use dp{outer * max(1, dp // outer)}",
            )
        zero = sizes.get("zero", 0)
        if zero > 3:
            raise ConfigError(f"layout name {name!r}", "ZeRO has the stages 0 to 3", "use zero3")
        return cls(
            sizes.get("pp", 1), outer, dp // outer, sizes.get("r", 1), sizes.get("u", 1), sizes.get("tp", 1), zero
        )

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name -> index of `rank` on it."""
        index: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, index[axis] = divmod(rank, size)
        return index

    def rank(self, coordinates: dict[str, int]) -> int:
        """The inverse of `coordinates`."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + coordinates[axis]
        return rank

    def group(self, axes: tuple[str, ...], rank: int) -> list[int]:
        """The ranks that differ from `rank` only on `axes`, in rank order."""
        here = self.coordinates(rank)
        choices = (range(size) if axis in axes else [here[axis]] for axis, size in zip(AXES, self.sizes, strict=True))
        return [self.rank(dict(zip(AXES, index, strict=True))) for index in itertools.product(*choices)]

    def describe(self) -> str:
        """One line for a person: `8 ranks = tensor 2 x pipeline 1 x Ulysses 2 x ring 1 x data 2`."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        sequence = f"Ulysses {self.ulysses} x ring {self.ring}"
        shards = self.dp_inner * self.cp
        over = f"{shards} ranks" if shards > 1 else "1 rank, which shares nothing out"
        zero = f", ZeRO-{self.zero} over {over}" if self.zero else ""
        return f"{ranks} = tensor {self.tp} x pipeline {self.pp} x {sequence} x data {self.dp}{zero}"
