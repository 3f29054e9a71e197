"""Activations on the host: what a layer keeps for its backward goes to pinned memory and comes back one layer ahead.

    compute    layer 0 | layer 1 | layer 2 |      backward 2 | backward 1 | backward 0
    to host              0 ~~~~~   1 ~~~~~
    to device                             2 ~~~   1 ~~~~~      0 ~~~~~

A layer's tensors are let go on the device when the next layer has run, so that two layers' are there at a time. Copies
run on a stream of their own. On a CPU there is none, and a copy is a plain one: the order of what happens is the same,
which is what the tests check; nothing is gained there, so a run on CPUs refuses it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20
"""Bytes of a tensor below which it stays on the device: a copy's latency would be all that it costs."""


class Copier(Protocol):
    """Copies of whole storages between a device and the host, beside the computation."""

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


def copier(device: torch.device) -> Copier:
    """The one for a device."""
    return CUDACopier(device) if device.type == "cuda" else PlainCopier()


class _Slot:
    """A storage that is on the host, on the device, or on its way."""

    def __init__(self, storage: torch.UntypedStorage, device: torch.device, copies: Copier) -> None:
        self.copies = copies
        self.device_bytes: Tensor | None = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.host, self.mark = copies.to_host(self.device_bytes)
        self.uses = 0

    def let_go(self) -> None:
        """Let go of the device's copy, when the host's is there."""
        self.copies.wait(self.mark)
        self.device_bytes = None

    def fetch(self) -> None:
        if self.device_bytes is None:
            self.device_bytes, self.mark = self.copies.to_device(self.host)

    def take(self) -> Tensor:
        """The bytes on the device, as soon as they are there; held here until the last use has taken them."""
        self.fetch()
        self.copies.wait(self.mark)
        taken = self.device_bytes
        assert taken is not None
        self.uses -= 1
        if self.uses == 0:
            self.device_bytes = None
        return taken


class _Layer:
    """What one layer put on the host, and the layer before it."""

    def __init__(self, before: "_Layer | None") -> None:
        self.before, self.slots, self.fetched = before, dict[int, _Slot](), False

    def let_go(self) -> None:
        for slot in self.slots.values():
            slot.let_go()

    def fetch(self) -> None:
        """Bring it back, the first time that this is asked: what has been used since is gone again."""
        slots, self.fetched = () if self.fetched else self.slots.values(), True
        for slot in slots:
            slot.fetch()


class _Saved:
    """The place of a saved tensor in a storage that is on the host."""

    def __init__(self, layer: _Layer, key: int, x: Tensor) -> None:
        self.layer, self.slot, self.dtype = layer, layer.slots[key], x.dtype
        self.slot.uses += 1
        self.view = x.shape, x.stride(), x.storage_offset()

    def restore(self) -> Tensor:
        self.layer.fetch()
        if self.layer.before is not None:
            self.layer.before.fetch()  # travels while this layer's backward computes
        return self.slot.take().view(self.dtype).as_strided(*self.view)


class Offload:
    """The layers of one forward: `with offload.layer(blocks): x = block(x)` for each. The last one's tensors stay
    on the device, too, for its backward comes first.

    Args:
        copies: how to copy.
        smallest: bytes below which a tensor stays.
    """

    def __init__(self, copies: Copier, smallest: int = SMALLEST) -> None:
        self.copies, self.smallest = copies, smallest
        self.last: _Layer | None = None

    @contextmanager
    def layer(self, blocks: Iterable[nn.Module], wanted: bool = True) -> Iterator[None]:
        """Where this is `wanted`, what is saved inside goes to the host, but the weights of `blocks`; at the end what
        the layer before saved is let go."""
        if not wanted or not torch.is_grad_enabled():
            yield
            return
        current = _Layer(self.last)
        weights: set[int] = set()

        def pack(x: Tensor) -> Tensor | _Saved:
            storage = x.untyped_storage()
            key = storage._cdata
            if not weights:  # not before, for sharded weights are gathered when a block begins
                weights.update(p.untyped_storage()._cdata for block in blocks for p in block.parameters())
            if key in weights or storage.nbytes() < self.smallest:
                return x
            if key not in current.slots:
                current.slots[key] = _Slot(storage, x.device, self.copies)
            return _Saved(current, key, x)

        def unpack(packed: Tensor | _Saved) -> Tensor:
            return packed.restore() if isinstance(packed, _Saved) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        if self.last is not None:
            self.last.let_go()
        self.last = current
