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

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megasp.host_copies import Copier, HostCopy

SMALLEST = 2**20
"""Bytes of a tensor below which it stays on the device: a copy's latency would be all that it costs."""


class _Slot(HostCopy):
    """A storage that is on the host, on the device, or on its way."""

    uses = 0

    def take(self) -> Tensor:
        """The bytes on the device, as soon as they are there; held here until the last use has taken them."""
        taken = self.get()
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
            if key in weights or storage.nbytes() < self.smallest or self.copies.is_host(x):
                return x
            if key not in current.slots:
                whole = x.detach().as_strided((storage.nbytes() // x.itemsize,), (1,), 0)
                current.slots[key] = _Slot.of(whole.view(torch.uint8), self.copies)
            return _Saved(current, key, x)

        def unpack(packed: Tensor | _Saved) -> Tensor:
            return packed.restore() if isinstance(packed, _Saved) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        if self.last is not None:
            self.last.let_go()
        self.last = current
