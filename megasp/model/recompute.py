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


class _Again:
    """The place of a saved tensor in the storage that is made again."""

    def __init__(self, saved: Tensor) -> None:
        self.view = saved.shape, saved.stride(), saved.storage_offset()

    def of(self, again: Tensor) -> Tensor:
        return again.as_strided(*self.view)
