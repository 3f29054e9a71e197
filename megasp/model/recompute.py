"""Activations that are not kept but made again in the backward (arXiv 1604.06174, 2205.05198).

Randomness is a function here, so what is made again is the same, bit for bit, with no generator's state to keep.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megasp.collectives import start_all_gather
from megasp.parallel_state import Axis

recomputed: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""recomputed(function, *inputs): its value, of which the backward runs `function` again and keeps the inputs alone."""


@contextmanager
def made_again(out: Tensor, function: Callable[[Tensor], Tensor], x: Tensor, wanted: bool = True) -> Iterator[None]:
    """Where this is `wanted`, functions that run inside do not keep `out`: their backward makes it by function(x).

    For what is cheap to make and followed by what is dear, such as a norm and a linear layer: that is not run again.
    """
    if not wanted or not torch.is_grad_enabled():
        yield
        return
    storage = out.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | _Again:
        if saved.untyped_storage()._cdata != storage:
            return saved
        return _Again(saved)

    def unpack(packed: Tensor | _Again) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed.of(function(x))

    with saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def shared_out(x: Tensor, axis: Axis, wanted: bool = True) -> Iterator[None]:
    """Where this is `wanted`, functions that run inside keep this rank's share of `x`, which is the same on every rank
    of the axis; their backward gathers it (Megatron-LM's distributed saved activations, arXiv 2104.04473 section 3.5).

    Args:
        x: contiguous, its elements a multiple of the axis's size.
    """
    if not wanted:
        yield
        return
    storage = x.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | _Share:
        return _Share(saved, axis) if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Tensor | _Share) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.gathered()

    with saved_tensors_hooks(pack, unpack):
        yield


class _Share:
    """This rank's share of a saved tensor's elements, in their order."""

    def __init__(self, saved: Tensor, axis: Axis) -> None:
        self.shape, self.axis = saved.shape, axis
        self.share = saved.flatten().chunk(axis.size)[axis.rank].clone()

    def gathered(self) -> Tensor:
        return start_all_gather(self.share, self.axis).wait().view(self.shape)


class _Again:
    """The place of a saved tensor in the storage that is made again."""

    def __init__(self, saved: Tensor) -> None:
        self.view = saved.shape, saved.stride(), saved.storage_offset()

    def of(self, again: Tensor) -> Tensor:
        return again.as_strided(*self.view)
