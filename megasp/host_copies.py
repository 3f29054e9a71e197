"""Copies between a device and the host's memory, beside the computation.

On a GPU they run on a stream of their own, through pinned memory. On a CPU there is none, and a copy is a plain one:
the order of what happens is the same, which is what tests check.
"""

from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Copier(Protocol):
    """Copies of bytes, and marks of when they are done."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        """A copy of bytes on the host, and a mark of when it is done."""

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """A copy on the device, and a mark of when it is done."""

    def onto(self, x: Tensor, values: Tensor) -> Any:
        """Copy values of the host onto `x` on the device, in its dtype; a mark of when it is done."""

    def wait(self, mark: Any) -> None:
        """Let the computation that follows wait for a mark."""

    def settle(self, mark: Any) -> None:
        """Let the host wait for a mark."""

    def is_host(self, x: Tensor) -> bool:
        """Whether these bytes are on the host as they are."""


class CUDACopier:
    """On a side stream, through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host, self._copy(host, x)

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return x, self._copy(x, host)

    def onto(self, x: Tensor, values: Tensor) -> Any:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)  # its allocator keeps it until it has travelled
        return self._copy(x, pinned.copy_(values))

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        # Also into memory that is new: what was there before may still be in use on the other stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self, mark: Any) -> None:
        mark.synchronize()

    def is_host(self, x: Tensor) -> bool:
        return x.device.type == "cpu"


class PlainCopier:
    """Copies at once."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        return x.clone(), None

    to_device = to_host

    def onto(self, x: Tensor, values: Tensor) -> Any:
        x.copy_(values)

    def wait(self, mark: Any) -> None:
        pass

    settle = wait

    def is_host(self, x: Tensor) -> bool:
        return False


class Staying(PlainCopier):
    """Copies nothing: what is to be on the host stays where it is."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        return x, None

    to_device = to_host


def copier(device: torch.device) -> Copier:
    """The one for a device."""
    return CUDACopier(device) if device.type == "cuda" else PlainCopier()


class HostCopy:
    """Bytes that are on the host, and on the device, too, as long as they are wanted there."""

    def __init__(self, copies: Copier, host: Tensor, device_bytes: Tensor | None = None, mark: Any = None) -> None:
        self.copies, self.host, self.device_bytes, self.mark = copies, host, device_bytes, mark

    @classmethod
    def of(cls, x: Tensor, copies: Copier) -> Self:
        """Of bytes on the device, which set off."""
        host, mark = copies.to_host(x)
        return cls(copies, host, x, mark)

    def let_go(self) -> None:
        """Let go of the device's copy, when the host's is there."""
        if self.device_bytes is not None:
            self.copies.wait(self.mark)
            self.device_bytes = None

    def fetch(self) -> None:
        """Let them set off to the device, unless they are there."""
        if self.device_bytes is None:
            self.device_bytes, self.mark = self.copies.to_device(self.host)

    def get(self) -> Tensor:
        """The bytes on the device, as soon as they are there."""
        self.fetch()
        self.copies.wait(self.mark)
        assert self.device_bytes is not None
        return self.device_bytes
