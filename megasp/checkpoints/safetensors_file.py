"""Write a safetensors file tensor by tensor, hashed on the way. (Reading is the safetensors package's.)

Unlike `safetensors.torch.save_file` it holds one tensor at a time, takes views of any stride and device, and returns
the SHA-256 of what it wrote without reading it again, and a checksum of each tensor. The hash judges whether a file is
as it was written; the checksums, which cost next to nothing, say which of its tensors are not. The format: eight bytes
with the header's length, the header (JSON), the tensors' bytes without gaps. https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Entry:
    """One tensor to write.

    Attributes:
        key: its name in the file.
        dtype, shape: of the tensor.
        read: returns it, when its turn has come.
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
    """Size and SHA-256 (hexadecimal) of a file, and the `checksum` of each tensor in it by its key."""

    bytes: int
    sha256: str
    checksums: dict[str, str] = field(default_factory=dict)


def write(path: Path, entries: Sequence[Entry]) -> StoredFile:
    """Write the entries and make them durable (fsync).

    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: as the file system says.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned
    header = _header(entries)
    digest = hashlib.sha256(header)
    checksums = {}
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for entry in entries:
            content = _bytes(entry.read())
            assert len(content) == entry.nbytes, entry
            hashed = hasher.submit(digest.update, content)  # hashing and writing both leave the interpreter lock
            file.write(content)
            checksums[entry.key] = checksum(content)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
        return StoredFile(file.tell(), digest.hexdigest(), checksums)


def checksum(content: memoryview) -> str:
    """The sum of the content's 64-bit words, hexadecimal: any change of one word changes it, at memory speed."""
    whole = len(content) // 8 * 8
    total = int(np.frombuffer(content[:whole], "<u8").sum(dtype=np.uint64)) if whole else 0
    return f"{(total + int.from_bytes(content[whole:], 'little')) % 2**64:016x}"


def layout(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes are in a file: key -> (start, stop), counted from the file's beginning.

    Raises:
        ValueError: the header cannot be read.
        OSError: as the file system says.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        key: (8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1]) for key, entry in header.items()
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
