"""Follows what would be allocated, storage by storage, and what is computed."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megasp.dry_run.shape_cache import Answer, asked
from megasp.footprint import pinned
from megasp.model.elementwise import Body

DEVICE_OF = torch.ops.prim.device.default


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak.

    What is computed from the host's tensors is the host's; copies between the two memories say where they go.

    Args:
        run: an operator with its arguments and keywords; without it as it is.

    Attributes:
        live, peak: bytes of the device now, and at most since `peak` was set.
        host, host_peak: the same of what would be in the host's memory.
        flops: kind -> floating-point operations since it was cleared.
        holders: who knows tensors by component; `action`: number of the pipeline's action that runs.
        expected: bytes of the device from which on it is looked at who holds what; `parts`: component -> bytes at the
            fullest of these moments since `look_for`. What nobody knows and what was not named when it was allocated is
            an activation: of this action, or of one before.
    """

    def __init__(self, run: Callable[..., Answer] = asked) -> None:
        super().__init__()
        self.run = run
        self.live = self.peak = self.host = self.host_peak = 0
        self.flops: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._of_host: set[int] = set()
        self._place: bool | None = None
        self._inside = False
        self.holders: Callable[[], Iterable[tuple[str, Tensor]]] = tuple
        self.action, self.parts = 0, Counter[str]()
        self.look_for(math.inf)
        self._names: dict[int, str | int] = {}
        self._runs: dict[Hashable, tuple[int, int, Counter[str]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which wraps every call, and compiles nothing here
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if DTensor in types:
            return NotImplemented  # it unwraps itself, and what it does with the local tensors comes back here
        out, made = self.run(func, args, kwargs or {})
        if self._inside:
            return out
        if made:
            hosted = self._hosts(args)
            for tensor in tree_iter(made):
                if isinstance(tensor, Tensor):
                    self.note(tensor.untyped_storage(), hosted)
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.flops["matrix products"] += _product_flops(name, args, out)
        elif "scaled_dot_product" in name:
            self.flops["attention"] += _attention_flops(name, args)
        return out

    def _hosts(self, args: Any) -> bool:
        """Whether what is made of these arguments is the host's."""
        if self._place is not None or not self._of_host:
            return bool(self._place)
        return any(isinstance(x, Tensor) and x.dim() > 0 and self.of_host(x) for x in tree_iter(args))

    def note(self, storage: torch.UntypedStorage, hosted: bool = False, name: str = "") -> None:
        """Count a storage that is new, and the host's where it is `hosted`, or has another size than when it was seen
        last. It may have the `name` of a component."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._names[key] = self.action
            if hosted:
                self._of_host.add(key)
                size = pinned(size) if self._place else size
        elif key in self._of_host:
            return
        if name:
            self._names[key] = name
        self._add(key, size - self._sizes.get(key, 0))
        self._sizes[key] = size
        self._see(self.live)

    def look_for(self, expected: float) -> None:
        """Look anew at who holds what, in moments that are as full."""
        self.expected, self._fullest = expected, 0
        self.parts.clear()

    def _see(self, size: int) -> None:
        """There are so many bytes at this moment, perhaps more than storages tell of."""
        self.peak = max(self.peak, size)
        if size > self._fullest and size >= self.expected:
            self._fullest = size
            names = self._names | {x.untyped_storage()._cdata: name for name, x in self.holders()}
            self.parts.clear()
            self.parts["working memory"] = size - self.live
            for key, held in self._sizes.items():
                name = names[key]
                if isinstance(name, int):
                    name = "working memory" if name == self.action else "kept activations"
                self.parts[name] += 0 if key in self._of_host else held

    @contextmanager
    def placed(self, on_host: bool) -> Iterator[None]:
        """What is allocated inside would be in the host's memory, where it is pinned, or the device's."""
        before, self._place = self._place, on_host
        yield
        self._place = before

    def one_kernel(self, body: Body, *tensors: Tensor, **constants: float) -> Any:
        """Run a body of which nothing is counted but what it returns."""
        self._inside = True
        out = body.eager(*tensors, **constants)
        self._inside = False
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage(), self._hosts(tensors))
        return out

    def once(self, key: Hashable, run: Callable[[], object]) -> None:
        """Run what leaves nothing behind. When the same comes again, `key` telling all that its allocations depend on,
        it is not run: what it took at its fullest moment is added to what is there now."""
        if key in self._runs:
            more, on_host, flops = self._runs[key]
        else:
            before = self.live, self.host
            peaks, flops_before = (self.peak, self.host_peak), self.flops.copy()
            self.peak, self.host_peak = before
            run()
            more, on_host, flops = self.peak - before[0], self.host_peak - before[1], self.flops - flops_before
            if (self.live, self.host) == before:
                self._runs[key] = more, on_host, flops
            self.peak, self.host_peak, self.flops = *peaks, flops_before
        self._see(self.live + more)
        self.host_peak = max(self.host_peak, self.host + on_host)
        self.flops.update(flops)

    def move_to_host(self, x: Tensor, is_pinned: bool = False) -> None:
        """A tensor that is the host's from now on."""
        key = x.untyped_storage()._cdata
        self._add(key, -self._sizes[key])
        self._of_host.add(key)
        self._sizes[key] = pinned(self._sizes[key]) if is_pinned else self._sizes[key]
        self._add(key, self._sizes[key])

    def of_host(self, x: Tensor) -> bool:
        """Whether a tensor is the host's."""
        return x.untyped_storage()._cdata in self._of_host

    def _add(self, key: int, size: int) -> None:
        if key in self._of_host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.live += size

    def _forget(self, key: int) -> None:
        self._add(key, -self._sizes.pop(key))
        del self._names[key]
        self._of_host.discard(key)


PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_linear_pointwise": 0}
"""Operators of matrix products, and the place of their first factor."""


def _product_flops(name: str, args: Sequence[Any], out: Any) -> int:
    return 2 * out.numel() * args[PRODUCTS[name]].shape[-1]


def _attention_flops(name: str, args: Sequence[Any]) -> int:
    """Of PyTorch's fused attention on a CPU, whose last argument says whether it is causal, and is counted half then:
    two products forward, five backward."""
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    return (5 if backward else 2) * 2 * query.numel() * key.shape[-2] // (2 if args[-1] is True else 1)
