"""Text corpora on disk: which files, and the documents in them.

A .jsonl or .json file holds one document a line, and so does stdin ("-"); a .npy file holds token ids, a document each
row; any other file is one document. Behind .gz, .zst, .bz2 or .xz they are decompressed as they are read.

A document of more than LONG bytes comes in parts, cut where the tokenizer gives each part the ids that it has in the
whole, so no more than a part of it is in memory and all processes share its work.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megasp.config.flags import REQUIRED, flag
from megasp.data.long_lines import RestOfLine, text_under
from megasp.errors import DataError

JSON_LINES = (".jsonl", ".json")
SOURCE_CODE = (
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
)
EXTENSIONS = (".jsonl", ".txt", ".md", ".rst", ".tex", ".html", *SOURCE_CODE)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
STDIN = Path("-")
LONG = 4 << 20  # bytes
PART = 1 << 20  # bytes or ids

Cutter = Callable[[str], int]
"""The last place at which a text can be cut without changing its ids, 0 for none."""


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Input."""

    input: tuple[Path, ...] = flag(REQUIRED, "files, directories to search, - for JSON lines on stdin", metavar="PATH")
    extensions: tuple[str, ...] = flag(EXTENSIONS, "endings of the files to take from directories", metavar=".EXT")
    exclude: tuple[str, ...] = flag((), "names of directories to pass over", metavar="NAME")
    json_keys: tuple[str, ...] = flag(("text",), "keys of a JSON line that hold text", metavar="KEY")
    skip_bad_lines: bool = flag(False, "count documents that are not valid text or JSON instead of stopping at them")


class Document(NamedTuple):
    """One document as it lies on disk.

    Attributes:
        path: its file.
        line: its line, from 1, in a file of JSON lines, or its row in a .npy file; 0 for a whole file.
        raw: its bytes; of a part or of ids none.
        read: bytes of all input read from disk with it.
        text: a part of a long document.
        ids: its token ids, where it has them already.
        begins, ends: whether it is the first and the last part of a document.
    """

    path: str
    line: int
    raw: bytes
    read: int = 0
    text: str | None = None
    ids: np.ndarray | None = None
    begins: bool = True
    ends: bool = True

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.raw) or (
            len(self.text) if self.text is not None else 0 if self.ids is None else self.ids.nbytes
        )

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}" if self.line else self.path


def find_files(
    inputs: Sequence[Path], extensions: Sequence[str] = EXTENSIONS, exclude: Sequence[str] = ()
) -> list[Path]:
    """The files to read, in order: a file as named, a directory's files below it by path.

    Hidden files, files with other extensions and the directories named by `exclude` are left out of directories.

    Raises:
        DataError: an input does not exist, or there is no file at all.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            endings = tuple(extension + packed for extension in extensions for packed in ("", *COMPRESSED))
            files += sorted(_walk(path, endings, exclude))
        elif path == STDIN or path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist", "input must be files or directories", "check the path")
    if not files:
        got = f"no documents at all in {', '.join(map(str, inputs))}"
        raise DataError(got, f"directories are searched for {' '.join(extensions)}", "name others by --extensions")
    return files


def _walk(directory: Path, extensions: tuple[str, ...], exclude: Sequence[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in exclude]
        yield from (Path(root, name) for name in names if name.endswith(extensions) and not name.startswith("."))


def read_documents(
    files: Iterable[Path], json_keys: Sequence[str] = (), cut: Cutter | None = None
) -> Iterator[Document]:
    """The documents of the files, in order, undecoded.

    Args:
        json_keys: keys of JSON lines; a long line is cut where there is one key.
        cut: how long documents are cut into parts; they are not without it.

    Raises:
        DataError: a file cannot be read.
    """
    before = 0
    for path in files:
        try:
            with _open(path) as (disk, file):
                for document in _documents(path, file, json_keys, cut):
                    read = before if disk is None else before + disk.tell()
                    yield document._replace(read=read)
            before += path.stat().st_size if path.is_file() else 0
        except (OSError, EOFError, lzma.LZMAError) as error:
            said = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {path} ({said})", "input must be readable", "mend it") from None


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO | None, BinaryIO]]:
    """(the file on disk if its position can be told, its content decompressed)."""
    if path == STDIN:
        yield None, sys.stdin.buffer
        return
    with path.open("rb") as disk:
        content: BinaryIO = disk
        if path.suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise DataError(
                    f"{path} is compressed", "it needs the package zstandard", "pip install zstandard"
                ) from None
            content = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(disk, read_across_frames=True), PART)
        elif path.suffix in COMPRESSED:
            library = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix]
            content = library.open(disk, "rb")
        yield disk if disk.seekable() else None, content


def _documents(path: Path, file: BinaryIO, json_keys: Sequence[str], cut: Cutter | None) -> Iterator[Document]:
    """The documents of one file."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if suffix in JSON_LINES or path == STDIN:
        number = 0
        while start := file.readline(LONG):
            number += 1
            line = Document(str(path), number, b"")
            if len(start) == LONG and cut and len(json_keys) == 1:
                blocks = _rest_of_line(start, file)
                yield from _parts(line, text_under(json_keys[0], blocks), cut)
                deque(blocks, maxlen=0)  # what follows a mistake
            else:
                yield line._replace(raw=b"".join(_rest_of_line(start, file)))
    elif suffix == ".npy":
        yield from _rows(path)
    else:
        start = file.read(LONG + 1)
        if cut and len(start) > LONG:
            yield from _parts(Document(str(path), 0, b""), _decoded(_blocks(start, file)), cut)
        else:
            yield Document(str(path), 0, start + file.read())


def _blocks(start: bytes, file: BinaryIO) -> Iterator[bytes]:
    yield start
    while block := file.read(PART):
        yield block


def _rest_of_line(start: bytes, file: BinaryIO) -> Iterator[bytes]:
    """A line of which `start` was read, in blocks."""
    while start:
        yield start
        start = b"" if start.endswith(b"\n") else file.readline(PART)


def _decoded(blocks: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # tolerates a byte order mark
    yield from map(decoder.decode, blocks)
    yield decoder.decode(b"", True)


def _parts(document: Document, texts: Iterator[str], cut: Cutter) -> Iterator[Document]:
    """A document in parts that begin and end where `cut` says; a bad one ends with a part of its bad bytes."""
    waiting, size, enough, begins = [""], 0, 1, True
    try:
        for more in texts:
            if size >= enough:
                text = "".join(waiting)
                at = cut(text)
                if at:
                    yield document._replace(text=text[:at], begins=begins, ends=False)
                    begins = False
                waiting, size = [text[at:]], len(text) - at
                enough = 1 if at else 2 * size  # text that cannot be cut is not looked through again for each block
            waiting.append(more)
            size += len(more)
    except UnicodeDecodeError as error:
        yield document._replace(raw=error.object, begins=begins)
    except RestOfLine as line:
        yield document._replace(raw=line.raw, begins=begins)
    else:
        yield document._replace(text="".join(waiting), begins=begins)


def _rows(path: Path) -> Iterator[Document]:
    """The rows of a .npy file of token ids, long ones in parts."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read", f"it must be an array of token ids ({error})", "save it anew"
        ) from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        got = f"{path} holds {array.dtype} of shape {array.shape}"
        raise DataError(got, "token ids are integers, [T] or [documents, T]", "save it as one of these")
    for number, row in enumerate(np.atleast_2d(array), 1):
        starts = range(0, len(row), PART) or range(1)
        for start in starts:
            ids = np.array(row[start : start + PART])
            yield Document(str(path), number, b"", 0, None, ids, start == 0, start == starts[-1])


def texts_of(document: Document, json_keys: Sequence[str]) -> list[str]:
    """The document's text under each key; blank text becomes "". A plain text file is the text of the first key.

    Raises:
        DataError: it is not UTF-8, not a JSON object, or lacks a key. The caller adds the document's place.
    """
    fix = "mend it, or pass --skip-bad-lines"
    if document.text is not None:
        return [document.text, *[""] * (len(json_keys) - 1)]
    try:
        text = document.raw.decode("utf-8-sig")  # tolerates a byte order mark
        if not document.line or not text.strip():
            return [text if text.strip() else "", *[""] * (len(json_keys) - 1)]
        entry = json.loads(text.rstrip())
        texts = [entry[key] for key in json_keys]
        "".join(texts).encode()  # JSON can escape half of a surrogate pair, which is no character
        return [text if text.strip() else "" for text in texts]
    except UnicodeError as error:
        raise DataError(f"not UTF-8 ({error})", "text must be UTF-8", fix) from None
    except json.JSONDecodeError as error:
        got = f"malformed JSON ({error.msg} at column {error.colno})"
        raise DataError(got, "each line must be one JSON object", fix) from None
    except (TypeError, KeyError):
        rule = f"a line must be an object with text under {', '.join(map(repr, json_keys))}"
        found = f"keys {', '.join(map(repr, entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise DataError(f"found {found[:200]}", rule, "name the keys by --json-keys, or " + fix) from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond what Python's parser takes
        raise DataError(f"unreadable JSON ({error})", "each line must be one JSON object", fix) from None
