"""Write a safetensors file tensor by tensor, hashed on the way, and check it. (Reading is the safetensors package's.)

Unlike `safetensors.torch.save_file` it holds a few tensors at a time, takes views of any stride and device, and returns
the SHA-256 of the header and of each tensor without reading anything again. One hash of all bytes would be bound to one
core, and that is slower than the writing; hashes of tensors take as many cores as there are, and name what is damaged.
The format: eight bytes with the header's length, the header (JSON), the tensors' bytes without gaps.
https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that a checkpoint may hold."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

THREADS = min(4, os.cpu_count() or 1)
"""That write and hash tensors, each one at a time. Several ranks share a machine."""
CHUNK_BYTES = 4 * 2**20
"""Written and hashed in turn, so that what is hashed is still in the cache."""
READ_BYTES = 2**18
"""Read and hashed in turn."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
SHOWN = 3
"""Damaged tensors that are named; of the others only the number is said."""


@dataclass(frozen=True)
class Entry:
    """One tensor to write.

    Attributes:
        key: its name in the file.
        dtype, shape: of the tensor.
        read: returns it, when its turn has come; several are read at a time.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredFile:
    """Size of a file, and the SHA-256 (hexadecimal) of its header and of each tensor by its key: together every byte.

    Of a file that version 1 of the format wrote, `sha256` is that of all bytes in one, and the others are empty.
    """

    bytes: int
    header: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""


def write(path: Path, entries: Sequence[Entry], hashed: bool = True) -> StoredFile:
    """Write the entries and make them durable (fsync).

    Args:
        hashed: without it the result says the size alone.
    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: as the file system says.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned
    header = _header(entries)
    places = _places(header)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def put(entry: Entry) -> str:
            content, digest, offset = _bytes(entry.read()), hashlib.sha256(), places[entry.key][0]
            assert len(content) == entry.nbytes, entry
            for start in range(0, entry.nbytes, CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                _write_at(file.fileno(), chunk, offset + start)
                if hashed:
                    digest.update(chunk)  # both leave the interpreter lock
            return digest.hexdigest()

        _write_at(file.fileno(), memoryview(header), 0)
        hashes = dict(zip(places, pool.map(put, entries), strict=True))
        os.fsync(file.fileno())
    size = len(header) + sum(entry.nbytes for entry in entries)
    return StoredFile(size, hashlib.sha256(header).hexdigest(), hashes) if hashed else StoredFile(size)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    """Write all of it, and let the disk begin, beside the hashing: the fsync at the end then finds little left."""
    start = offset
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
    if hasattr(os, "posix_fadvise"):  # Linux takes it as a word to write back; pages that are not yet clean it keeps
        os.posix_fadvise(file, start, offset - start, os.POSIX_FADV_DONTNEED)


def problem(path: Path, expected: StoredFile, hashes: bool = True) -> str | None:
    """How a file differs from what was written, to follow its name; None where it does not.

    Args:
        hashes: read every byte; without it the size alone is looked at.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                return f"has {size} bytes where the manifest says {expected.bytes}"
            damaged = _damaged(file, expected) if hashes else []
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not damaged:
        return None
    more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    return f"does not have the SHA-256 that the manifest says (damaged: {', '.join(damaged[:SHOWN])}{more})"


def _damaged(file: BinaryIO, expected: StoredFile) -> list[str]:
    """The keys of the tensors, or the part of the file, whose hash is another one."""
    if expected.sha256:
        same = hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256  # type: ignore[arg-type]
        return [] if same else ["somewhere: of this older checkpoint only the whole file's hash is known"]
    header = _read_header(file)
    if hashlib.sha256(header).hexdigest() != expected.header:
        return ["the header"]
    places = _places(header)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda place: _sha256(file.fileno(), *place), places.values())
        return [key for key, digest in zip(places, found, strict=True) if digest != expected.tensors.get(key)]


def _sha256(file: int, start: int, stop: int) -> str:
    """Of a file's bytes from `start` to `stop`."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    while start < stop:
        read = os.preadv(file, [buffer[: stop - start]], start)
        if not read:
            break  # it was cut meanwhile
        digest.update(buffer[:read])
        start += read
    return digest.hexdigest()


def layout(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes are in a file: key -> (start, stop), counted from the file's beginning.

    Raises:
        ValueError: the header cannot be read.
        OSError: as the file system says.
    """
    with path.open("rb") as file:
        return _places(_read_header(file))


def _read_header(file: BinaryIO) -> bytes:
    """The header with its length; nothing where the length cannot be one."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    return length + file.read(size) if size <= MAX_HEADER_BYTES else b""


def _places(header: bytes) -> dict[str, tuple[int, int]]:
    """`layout`, from the header with its length."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return {
        key: (len(header) + entry["data_offsets"][0], len(header) + entry["data_offsets"][1])
        for key, entry in entries.items()
    }


def _header(entries: Sequence[Entry]) -> bytes:
    """The header with its length, padded so that the tensors start at a multiple of eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise ValueError(f"{entry.key} has dtype {entry.dtype}, which safetensors does not hold")
        offsets = [offset, offset := offset + entry.nbytes]
        header[entry.key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order, little-endian as on every machine that PyTorch supports."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
