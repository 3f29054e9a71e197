"""Operators on fake tensors, fast: what an operator returns depends on the shapes of what it gets, so it is asked once.

PyTorch's FakeTensorMode takes some 150 us for an operator. Here its answer for one set of shapes is kept, and given
again in a tenth of that: the argument itself where the operator writes in place, or new tensors of the same shapes.
Views are made by the operator alone, and whatever else may come is left to the mode each time. What exists when is the
same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager


class Answer(NamedTuple):
    """What an operator returned.

    Attributes:
        out: it.
        made: tensors whose storages may be new.
    """

    out: Any
    made: Sequence[Any]


def asked(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Answer:
    """func(*args, **kwargs), run by itself."""
    out = func(*args, **kwargs)
    return Answer(out, (out, args, kwargs))


_SLOW = object()


class _Same(NamedTuple):
    """The argument of this place, changed or not."""

    place: int


class _New(NamedTuple):
    """New tensors of these shapes, strides, dtypes and devices; and whether they come as one, or as a tuple or list."""

    like: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
    container: type | None


class ShapeCache:
    """Operators on the fake tensors of one mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[Any, Any] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Answer:
        """func(*args, **kwargs)."""
        if func.is_view and type(args[0]) is FakeTensor and args[0].constant is None:
            return Answer(self._view(func, args, kwargs), ())
        try:
            key = _key(func, args, kwargs)
            known = self._known.get(key)
        except TypeError:  # something that has no key
            known = _SLOW
        if known is None:
            return self._asked(key, func, args, kwargs)
        if known is _SLOW:
            return asked(func, args, kwargs)
        if type(known) is _Same:
            return Answer((*args, *kwargs.values())[known.place], ())
        with torch._C._DisableTorchDispatch():
            bare = [torch.empty_strided(*like[:2], dtype=like[2], device="meta") for like in known.like]
        made = [self._fake(x, like[3]) for x, like in zip(bare, known.like, strict=True)]
        return Answer(made[0] if known.container is None else known.container(made), made)

    def _view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        device = args[0].fake_device
        with in_kernel_invocation_manager(self.mode):
            out = func(*args, **kwargs)
        return self._fake(out, device) if isinstance(out, Tensor) else type(out)(self._fake(x, device) for x in out)

    def _fake(self, bare: Tensor, device: torch.device) -> Tensor:
        """FakeTensor(mode, bare, device), whose attributes are the same for every one of a device."""
        if device not in self._attributes:
            self._attributes[device] = dict(FakeTensor(self.mode, bare, device).__dict__)
        fake = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
        fake.__dict__.update(self._attributes[device])
        return fake

    def _asked(self, key: Any, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Answer:
        """The mode's own answer, from which what to do the next time is seen."""
        answer = asked(func, args, kwargs)
        self._known[key] = _kind(func, answer.out, (*args, *kwargs.values()))
        return answer


def _key(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func.namespace != "aten":
        raise TypeError
    return func, tuple([of(x) for x in args]), tuple([(name, of(x)) for name, x in kwargs.items()])


def of(value: Any) -> Any:
    """What there is to know of an argument; 1 and 1.0 are not the same.

    Raises:
        TypeError: its value may matter.
    """
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise TypeError
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind is list or kind is tuple:
        return kind, tuple([of(x) for x in value])
    if isinstance(value, Tensor):
        raise TypeError
    return kind, value


CHANGES_SHAPE = ("set_", "resize_", "resize_as_")
"""In-place operators whose effect is on shapes and storages, beside those that PyTorch tags so."""


def _kind(func: Any, out: Any, arguments: Sequence[Any]) -> Any:
    if torch.Tag.inplace_view in func.tags or func.overloadpacket.__name__ in CHANGES_SHAPE:
        return _SLOW
    for place, argument in enumerate(arguments):
        if out is argument and type(out) is FakeTensor:
            return _Same(place)
    tensors = [out] if isinstance(out, Tensor) else out
    if not isinstance(tensors, list | tuple) or not tensors or any(type(x) is not FakeTensor for x in tensors):
        return _SLOW
    if any(x.constant is not None for x in tensors):
        return _SLOW
    given = {_storage(x) for x in _tensors(arguments)}
    storages = [_storage(x) for x in tensors]
    if not given.isdisjoint(storages) or len(set(storages)) < len(storages):
        return _SLOW
    whole = [x for x in tensors if x.storage_offset() == 0]
    if len(whole) < len(tensors):
        return _SLOW
    container = None if isinstance(out, Tensor) else type(out)
    return _New(tuple((x.shape, x.stride(), x.dtype, x.fake_device) for x in tensors), container)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [y for y in x if isinstance(y, Tensor)]
    return found
