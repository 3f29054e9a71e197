"""Megatron-LM's indexed dataset: reads `PREFIX.bin` (raw tokens, nothing else) and `PREFIX.idx`:

    bytes             content
    9                 magic "MMIDIDX\\0\\0"
    8 + 1             u64 version (1), u8 dtype code
    8 + 8             u64 S sequences, u64 D entries of document_indices (documents + 1)
    4 S               i32 tokens in each sequence
    8 S               i64 byte offset in .bin of each sequence
    8 D               i64 document_indices: 0, then the sequence at which each document ends; the last is S
    S                 i8 mode of each sequence, in multimodal datasets only

Everything is little-endian and packed, so the arrays are unaligned. `np.searchsorted` would first copy such an array
whole; `bisect` touches only the entries that it compares.

The index is memory-mapped. Tokens are read by `pread`: waiting for a disk in a page fault would hold Python's lock, and
so the training thread, too; and where a file was truncated a fault ends the process, while `pread` comes back short.
"""

import hashlib
import mmap
import os
import struct
import time
import weakref
from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np

from megasp.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, S, D
CHECK_SECONDS = 1.0  # between two looks at whether the files have changed
DTYPES = {code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), 1)}


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron-LM's writers choose for token ids."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedDataset:
    """A tokenized corpus on disk.

        corpus = IndexedDataset("data/code_text_document")
        len(corpus), corpus.num_documents, corpus.num_tokens
        corpus[0]                        # tokens of the first sequence
        corpus.tokens(10_000, 12_048)    # a range of the corpus read as one stream of tokens
        corpus.document_at(10_000)       # the document that token 10,000 belongs to

    Opening checks both files' sizes against the header and the last sequence, in constant time however large the
    corpus; `megasp data verify` reads everything.

    Args:
        prefix: the path of both files without .bin and .idx.

    Raises:
        DataError: a file is missing, truncated, of another format, or does not belong to the other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                plain = self.prefix.removesuffix(".bin").removesuffix(".idx")
                fix = f"give the prefix, {plain}" if plain != self.prefix else "check the prefix and its directory"
                raise DataError(f"{path} does not exist", "a dataset is the two files PREFIX.bin and PREFIX.idx", fix)
        self._opened, self._checked = _versions(prefix), time.monotonic()
        self._index, self._bin = _map(idx_path(prefix)), os.open(bin_path(prefix), os.O_RDONLY)
        weakref.finalize(self, os.close, self._bin)
        self.dtype, sequences, entries = self._read_header()
        offset = HEADER.size
        self.sequence_lengths = np.frombuffer(self._index, "<i4", sequences, offset)
        self.sequence_pointers = np.frombuffer(self._index, "<i8", sequences, offset + 4 * sequences)
        self.document_indices = np.frombuffer(self._index, "<i8", entries, offset + 12 * sequences)
        self._check_ends()
        self.num_tokens = self._opened[1][0] // self.dtype.itemsize
        self.num_documents = entries - 1

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """(dtype, sequences, entries of document_indices), having checked the .idx file's size."""
        path, size = idx_path(self.prefix), len(self._index)
        fix = "make the dataset again with `megasp preprocess`"
        if self._index[:8] == b"TNTIDX\x00\x00":
            raise DataError(f"{path} is in fairseq's legacy format (TNTIDX)", "only MMIDIDX files are read", fix)
        if not size or self._index[:9] != MAGIC[:size]:
            raise DataError(f"{path} starts with {self._index[:9]!r}", f"an index starts with {MAGIC!r}", fix)
        if size < HEADER.size:
            raise DataError(f"{path} is truncated at {size} bytes", f"its header has {HEADER.size}", fix)
        _, version, code, sequences, entries = HEADER.unpack_from(self._index)
        if version != 1:
            raise DataError(f"{path} is of version {version}", "only version 1 is known", fix)
        if code not in DTYPES:
            raise DataError(f"{path} has dtype code {code}", f"known codes are 1 to {len(DTYPES)}", fix)
        expected = HEADER.size + 12 * sequences + 8 * entries
        if sequences and size == expected + sequences:
            fix = "use a text-only dataset"
            raise DataError(f"{path} holds a mode per sequence", "multimodal datasets are not supported", fix)
        if size != expected:
            state = "truncated" if size < expected else "longer than its header says"
            rule = f"{sequences} sequences and {entries} document entries take {expected} bytes"
            raise DataError(f"{path} is {state}: {size} bytes", rule, "copy both files again")
        return DTYPES[code], sequences, entries

    def _check_ends(self) -> None:
        """Check the ends of the arrays, and with them the size of the .bin file."""
        sequences, documents = len(self), self.document_indices
        ends = (int(documents[0]), int(documents[-1])) if len(documents) else None
        if ends != (0, sequences):
            rule = f"they must run from 0 to its {sequences} sequences"
            raise DataError(f"{idx_path(self.prefix)} has document ends {ends}", rule, "copy both files again")
        expected = 0
        if sequences:
            expected = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        size = self._opened[1][0]
        if size != expected:
            state = "shorter" if size < expected else "longer"
            got = f"{bin_path(self.prefix)} is {state} than its index says: {size} bytes"
            raise DataError(got, f"the last sequence ends at byte {expected}", "copy both files again")

    def __len__(self) -> int:
        """Sequences. (Megatron-LM may write several per document; `preprocess` writes one.)"""
        return len(self.sequence_lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of sequence i, [length]."""
        start = self.sequence_token(i)
        return self.tokens(start, start + int(self.sequence_lengths[i]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the corpus read as one stream, [stop - start].

        Raises:
            DataError: the file has become shorter.
        """
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        found = np.empty(stop - start, self.dtype)
        left, offset = found.view(np.uint8).data, start * self.dtype.itemsize
        while left:
            count = os.preadv(self._bin, [left], offset)
            if count == 0:
                raise self._changed("ends before the tokens that its index names")
            left, offset = left[count:], offset + count
        return found

    def check_unchanged(self) -> None:
        """Look, at most once in CHECK_SECONDS, whether both files are those that were opened, by size and time.

        Raises:
            DataError: one is gone, or was written to or replaced.
        """
        if time.monotonic() < self._checked + CHECK_SECONDS:
            return
        try:
            changed = _versions(self.prefix) != self._opened
        except OSError as error:
            raise self._changed(f"is gone ({error.strerror})") from None
        if changed:
            raise self._changed("was written to or replaced")
        self._checked = time.monotonic()

    def _changed(self, what: str) -> DataError:
        rule = "its order of samples and its tokens must stay what they were when the run began"
        return DataError(f"{self.prefix} {what} while it was in use", rule, "restore it, and resume the run")

    def sequence_token(self, i: int) -> int:
        """The token at which sequence i begins; `num_tokens` for i = len(self)."""
        return self.num_tokens if i == len(self) else int(self.sequence_pointers[i]) // self.dtype.itemsize

    def document_range(self, document: int) -> tuple[int, int]:
        """The tokens [start, stop) of a document."""
        first, last = self.document_indices[document : document + 2]
        return self.sequence_token(int(first)), self.sequence_token(int(last))

    def document_bounds(self, first: int, last: int) -> np.ndarray:
        """The tokens at which documents first, first + 1, ... last begin (`last` may be num_documents), int64."""
        sequences = self.document_indices[first : last + 1]
        if not len(self):
            return np.zeros(len(sequences), np.int64)
        begins = self.sequence_pointers[np.minimum(sequences, len(self) - 1)] // self.dtype.itemsize
        return np.where(sequences < len(self), begins, self.num_tokens)

    def document_at(self, token: int) -> int:
        """The document that holds `token`, by binary search."""
        assert 0 <= token < self.num_tokens, (token, self.num_tokens)
        sequence = bisect_right(self.sequence_pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self.document_indices, sequence) - 1

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The tokens in [start, stop) at which a document begins, int64, ascending, by binary search."""
        sequences = [bisect_left(self.sequence_pointers, token * self.dtype.itemsize) for token in (start, stop)]
        first, last = (bisect_left(self.document_indices, sequence) for sequence in sequences)
        pointers = self.sequence_pointers[self.document_indices[first:last]]
        return np.unique(pointers) // self.dtype.itemsize  # an empty document begins where the next one does

    def fingerprint(self) -> str:
        """An id of the content in constant time: both sizes, the header, and 16 evenly spaced blocks of each file.

        A corpus that was appended to, rebuilt or shuffled gets another one. A few edited tokens may go unseen.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, (size, _) in zip((idx_path(self.prefix), bin_path(self.prefix)), self._opened, strict=True):
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb") as file:
                for start in np.linspace(0, max(0, size - 4096), 16).astype(int).tolist():
                    digest.update(os.pread(file.fileno(), 4096, start))
        return digest.hexdigest()


def _versions(prefix: str | Path) -> tuple[tuple[int, int], ...]:
    """(size, time of the last change in ns) of .idx and .bin."""
    stats = (idx_path(prefix).stat(), bin_path(prefix).stat())
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _map(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, memory-mapped (an empty file cannot be)."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
