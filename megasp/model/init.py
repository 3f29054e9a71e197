"""Initial weights keyed by (seed, canonical name, tile): the same in every layout, each rank makes only its own.

A canonical matrix is cut into tiles of 256 x 256; each tile has a random stream of its own, so a rank that holds some
rows or some columns draws just the tiles that its box touches. Values are drawn in fp32 by numpy's Philox, hence do not
depend on the device, the dtype or the number of threads.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megasp.parameters import Box, Piece, local_shape, placed

TILE = 256


@dataclass(frozen=True)
class Factory:
    """Where and how parameters are made."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 1234

    def parameter(self, pieces: Sequence[Piece]) -> nn.Parameter:
        """A parameter made of `pieces` with its initial values; it carries them as its attribute `pieces`."""
        data = torch.empty(local_shape(pieces), device=self.device, dtype=self.dtype)
        if data.device.type != "meta":
            self.fill_(data, pieces)
        parameter = nn.Parameter(data)
        parameter.pieces = tuple(pieces)  # type: ignore[attr-defined]
        return parameter

    def fill_(self, data: Tensor, pieces: Sequence[Piece]) -> None:
        """Leave on a tensor made of `pieces` their initial values, which have this dtype's precision."""
        for piece, local in placed(pieces):
            data[local.slices] = initial_values(piece, self.seed).to(self.dtype).to(data)


def initial_values(piece: Piece, seed: int) -> Tensor:
    """Initial values of one box of a canonical tensor, fp32 on the CPU, of shape `piece.box.size`."""
    if piece.init_std == 0:
        return torch.full(piece.box.size, piece.init_mean)
    values = np.empty(piece.box.size, np.float32)
    spans = [range(a // TILE, -(-(a + n) // TILE)) for a, n in zip(piece.box.start, piece.box.size, strict=True)]
    for tile in itertools.product(*spans):
        box = Box(tuple(t * TILE for t in tile), (TILE,) * len(tile))
        wanted = box.intersect(piece.box)
        assert wanted is not None
        drawn = _tile(seed, piece.name, tile)
        values[wanted.relative_to(piece.box.start).slices] = drawn[wanted.relative_to(box.start).slices]
    return torch.from_numpy(values).mul_(piece.init_std).add_(piece.init_mean)


def _tile(seed: int, name: str, tile: tuple[int, ...]) -> np.ndarray:
    """Standard normal values of one tile, fp32 [TILE] * dims."""
    key = hashlib.blake2b(repr((seed, name, tile)).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal((TILE,) * len(tile), np.float32)
