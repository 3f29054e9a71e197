"""Text corpora on disk: which files, and the documents in them.

A .jsonl or .json file holds one document a line, any other file is one document.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megasp.config.flags import REQUIRED, flag
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
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Input."""

    input: tuple[Path, ...] = flag(REQUIRED, "files, and directories to search", metavar="PATH")
    extensions: tuple[str, ...] = flag(EXTENSIONS, "endings of the files to take from directories", metavar=".EXT")
    exclude: tuple[str, ...] = flag((), "names of directories to pass over", metavar="NAME")
    json_keys: tuple[str, ...] = flag(("text",), "keys of a JSON line that hold text", metavar="KEY")
    skip_bad_lines: bool = flag(False, "count documents that are not valid text or JSON instead of stopping at them")


class Document(NamedTuple):
    """One document as it lies on disk.

    Attributes:
        path: its file.
        line: its line, from 1, in a file of JSON lines; 0 for a whole file.
        raw: its bytes.
    """

    path: str
    line: int
    raw: bytes

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}" if self.line else self.path


def find_files(
    inputs: Sequence[Path], extensions: Sequence[str] = EXTENSIONS, exclude: Sequence[str] = ()
) -> list[Path]:
    """The files to read, in order: a file as named, a directory's files below it by path.

    Hidden files, files with other extensions and the directories named by `exclude` are left out of directories.

    Raises:
        DataError: an input does not exist or is compressed, or there is no file at all.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(_walk(path, tuple(extensions), exclude))
        elif path.suffix in COMPRESSED:
            raise DataError(f"{path} is compressed", "input must be plain text or JSON lines", "decompress it first")
        elif path.is_file():
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


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """The documents of the files, in order, undecoded.

    Raises:
        DataError: a file cannot be read.
    """
    for path in files:
        try:
            with path.open("rb") as file:
                if path.suffix in JSON_LINES:
                    yield from (Document(str(path), number, line) for number, line in enumerate(file, 1))
                else:
                    yield Document(str(path), 0, file.read())
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror})", "input must be readable", "mend it") from None


def texts_of(document: Document, json_keys: Sequence[str]) -> list[str]:
    """The document's text under each key; blank text becomes "". A plain text file is the text of the first key.

    Raises:
        DataError: it is not UTF-8, not a JSON object, or lacks a key. The caller adds the document's place.
    """
    fix = "mend it, or pass --skip-bad-lines"
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
