"""Writes an indexed dataset, byte for byte as Megatron-LM does; the format is in `indexed_dataset.py`."""

import os
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megasp.data.atomic_files import AtomicFiles
from megasp.data.indexed_dataset import DTYPES, HEADER, MAGIC, IndexedDataset, bin_path, idx_path
from megasp.errors import DataError

CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST = 2**31 - 1  # lengths are i32


class IndexedDatasetBuilder:
    """Streams documents to `PREFIX.bin`, then writes `PREFIX.idx`.

        with IndexedDatasetBuilder("data/code_text_document", best_dtype(vocab_size)) as builder:
            for tokens in documents:
                builder.add_document(tokens)

    Both files appear when the block ends (or by `finalize()`), and neither if it ends in an exception. Memory: 12
    bytes a document.

    Raises:
        DataError: the files exist or cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        if self.dtype not in CODES:
            raise DataError(f"dtype {self.dtype}", f"the format knows {[str(d) for d in CODES]}", "use uint16 or int32")
        self._output = AtomicFiles(bin_path(prefix), idx_path(prefix))
        self._bin, self._idx = self._output.files
        self._lengths, self._document_indices = array("i"), array("q", [0])
        self._open_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: [T], all of the document's sequences one after the other.
            lengths: tokens of each sequence (sum T); one sequence of T tokens when None.

        Raises:
            DataError: a token does not fit the dtype, or a sequence exceeds 2^31 - 1 tokens.
        """
        lengths = [len(tokens)] if lengths is None else lengths
        assert sum(lengths) == len(tokens), (list(lengths), len(tokens))
        if max(lengths, default=0) > LONGEST:
            rule = f"a sequence holds at most {LONGEST}"
            raise DataError(f"a sequence of {max(lengths)} tokens", rule, "split it over several sequences")
        self._write(tokens)
        self._lengths.extend(lengths)
        self._document_indices.append(len(self._lengths))

    def extend_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append part of a document of one sequence; `end_document` follows the last part.

        Raises:
            DataError: a token does not fit the dtype, or the document exceeds 2^31 - 1 tokens.
        """
        if self._open_tokens + len(tokens) > LONGEST:
            got = f"document {self.num_documents} has more than {LONGEST} tokens"
            raise DataError(got, "the format counts a sequence's tokens in 31 bits", "split the document")
        self._write(tokens)
        self._open_tokens += len(tokens)

    def end_document(self) -> int:
        """End the document under way; return its tokens. Without any there was no document."""
        tokens, self._open_tokens = self._open_tokens, 0
        if tokens:
            self._lengths.append(tokens)
            self._document_indices.append(len(self._lengths))
        return tokens

    def drop_document(self) -> None:
        """Forget the parts of the document under way."""
        self._bin.truncate(self._bin.seek(-self._open_tokens * self.dtype.itemsize, os.SEEK_CUR))
        self._open_tokens = 0

    def _write(self, tokens: Sequence[int] | np.ndarray) -> None:
        values = np.asarray(tokens)
        if values.dtype != self.dtype and self.dtype.kind in "iu" and len(values):
            low, high, limits = int(values.min()), int(values.max()), np.iinfo(self.dtype)
            if low < limits.min or high > limits.max:
                rule = f"a {self.dtype} dataset holds {limits.min} to {limits.max}"
                raise DataError(f"token id {high if high > limits.max else low}", rule, "build with a wider dtype")
        self._bin.write(np.ascontiguousarray(values, self.dtype).data)

    def add_index(self, prefix: str | Path) -> None:
        """Append all documents of another dataset.

        Raises:
            DataError: it cannot be opened, or has another dtype.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            rule = f"all parts of {self.prefix} must be {self.dtype}"
            raise DataError(f"{prefix} holds {other.dtype}", rule, "preprocess both with the same tokenizer")
        offset = len(self._lengths)
        self._lengths.extend(other.sequence_lengths.tolist())
        self._document_indices.extend((other.document_indices[1:] + offset).tolist())
        with bin_path(prefix).open("rb") as file:
            shutil.copyfileobj(file, self._bin, 1 << 24)

    def finalize(self) -> None:
        """Write the index and give both files their names."""
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:])
        documents = np.frombuffer(self._document_indices, np.int64)
        self._idx.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(documents)))
        self._idx.write(lengths.astype("<i4").tobytes())
        self._idx.write((pointers * self.dtype.itemsize).astype("<i8").tobytes())
        self._idx.write(documents.astype("<i8").tobytes())
        self._output.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finalize()
        finally:
            self._output.discard()
