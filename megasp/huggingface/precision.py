"""Autocast (Trainer's bf16, Accelerate's mixed precision) around megasp's own autograd Functions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def cast(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in the dtype in which autocast would compute a product of them, with autocast off meanwhile: within a
    Function it would choose for each operation, and not in the backward. Without autocast they are as they were."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        yield tensors
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield tuple(x.to(dtype) for x in tensors)
