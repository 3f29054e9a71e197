"""Reads files of `torch.save` and pickles, without importing or calling anything that they name.

A pickle is a program: it names functions of any module, and has them called. Here each name is looked up in a table,
and one that is not in it is refused. What the table gives is inert: numbers, containers, tensors over a mapping of the
file, and records that only keep what they are given. So nothing of a checkpoint can run, and nothing need be installed
that wrote it.

A file of `torch.save` is a zip of stored (not compressed) members: `data.pkl`, and the bytes of each tensor.
"""

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megasp.errors import CheckpointError

WRITE_AGAIN = "copy it again, or convert an earlier checkpoint"


class Record:
    """In place of an object of a class that is not needed here: its attributes, and what it was made with."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        self.args = args
        self.__dict__.update(attributes)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


@cache
def _record(name: str) -> type[Record]:
    return type(name.rpartition(".")[2], (Record,), {})


RECORDS = (
    "argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "io.BytesIO", "torch.device", "torch.Tensor",
    "torch.nn.parameter.Parameter",
)  # fmt: skip
RECORD_FAMILIES = ("megatron.", "numpy.", "pathlib.", "transformer_engine.", "torch.distributed.checkpoint.")
"""Names, and beginnings of names, that stand for records. None of these modules is imported."""

_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int64": torch.int64,
    "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "Float8_e4m3fnStorage": torch.float8_e4m3fn,
    "Float8_e5m2Storage": torch.float8_e5m2, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, set, frozenset, int, float, bool, str)},
    "builtins.getattr": lambda owner, name: Record(owner, name),  # how Python 3.11 pickles a member of an enum
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocol 2 pickles bytes
    "torch.Size": tuple,
    "torch.serialization._get_layout": lambda name: name,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: _tensor(*arguments),
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}
"""What a name in a pickle stands for."""


class _Refused(Exception):
    """A pickle names what is not in the table."""


class _Unpickler(pickle.Unpickler):
    """Makes objects of the table's things alone.

    Args:
        storage: bytes of a tensor, by dtype, key and number of elements.
    """

    def __init__(self, content: bytes, storage: Callable[[torch.dtype, str, int], Tensor] | None = None) -> None:
        super().__init__(io.BytesIO(content))
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full in RECORDS or full.startswith(RECORD_FAMILIES):
            return _record(full)
        raise _Refused(full)

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or self.storage is None or not isinstance(dtype, torch.dtype):
            raise _Refused(f"persistent {kind}")
        return self.storage(dtype, key, numel)


_BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    RuntimeError, ImportError, MemoryError, OverflowError, RecursionError, NotImplementedError,
)  # fmt: skip
"""What damaged bytes raise, depending on where the damage is."""


def read_pickle(path: Path) -> Any:
    """The object that a plain pickle holds.

    Raises:
        CheckpointError: it cannot be read, is damaged, or names what is not allowed.
    """
    return _guarded(path, lambda: _Unpickler(path.read_bytes()).load())


def read_torch(path: Path, start: int = 0, stop: int | None = None) -> Any:
    """The object that `torch.save` wrote. Its tensors lie in a mapping of the file: copy what is kept.

    Args:
        start, stop: where the object's bytes are in the file, which may hold others before and behind it; all of it
            without.
    Raises:
        CheckpointError: it cannot be read, is damaged, or names what is not allowed.
    """
    return _guarded(path, lambda: _read_torch(path, start, stop or path.stat().st_size))


def _read_torch(path: Path, start: int, stop: int) -> Any:
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), stop - first, access=mmap.ACCESS_COPY, offset=first)
    archive = zipfile.ZipFile(cast("IO[bytes]", content))  # read from its end, so what stands before does not matter
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def place(name: str) -> tuple[int, int]:
        """Where the bytes of a member begin, and their number."""
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        header = info.header_offset
        lengths = (int.from_bytes(content[header + at : header + at + 2], "little") for at in (26, 28))
        start = header + 30 + sum(lengths)
        if start + info.file_size > len(content):
            raise ValueError(f"{name} is cut off")
        return start, info.file_size

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        start, size = place(f"data/{key}")
        if numel * dtype.itemsize > size:
            raise ValueError(f"data/{key} has {size} bytes for {numel} elements of {dtype}")
        return torch.frombuffer(content, dtype=dtype, count=numel, offset=start) if numel else torch.empty(0).to(dtype)

    start, size = place("data.pkl")
    return _Unpickler(content[start : start + size], storage).load()


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except _Refused as refused:
        rule = "only tensors, numbers, containers and Megatron-LM's settings are read from it, and nothing is ever run"
        fix = "do not trust this file; save the model again by megatron-core, or ask for this name to be allowed"
        raise CheckpointError(f"{path} names {refused}", rule, fix) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", str(error.strerror or error), "check the path") from None
    except _BROKEN as error:
        rule = f"it must be whole ({error or type(error).__name__})"
        raise CheckpointError(f"{path} cannot be read", rule, WRITE_AGAIN) from None
