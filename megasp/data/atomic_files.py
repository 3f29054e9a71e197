"""Output files that appear whole or not at all."""

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from megasp.errors import DataError


class AtomicFiles:
    """Files written under temporary names beside their destinations and renamed, in order, by `commit()`.

        with AtomicFiles(Path("corpus.bin"), Path("corpus.idx")) as output:
            output.files[0].write(...)

    Leaving the block commits; leaving it by an exception removes what was written. The last path is the one that
    readers look for first, so it is renamed last.

    Raises:
        DataError: a path exists (unless `overwrite`), or its directory cannot be written.
    """

    def __init__(self, *paths: Path, overwrite: bool = False) -> None:
        for path in paths:
            if path.exists() and not overwrite:
                raise DataError(f"{path} exists", "existing output is never overwritten", "remove it or name another")
        self._paths = paths
        self._partial = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths]
        self.files: list[BinaryIO] = []
        try:
            for path in self._partial:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.files.append(path.open("wb"))
        except OSError as error:
            self.discard()
            raise DataError(
                f"cannot write to {paths[0].parent} ({error.strerror})",
                "the output's directory must be writable",
                "name a directory of your own",
            ) from None

    def commit(self) -> None:
        """Make the files durable, then visible under their own names."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for partial, path in zip(self._partial, self._paths, strict=True):
            partial.replace(path)

    def discard(self) -> None:
        """Remove what was written; harmless after `commit()`."""
        for file, path in zip(self.files, self._partial, strict=False):  # fewer files, if opening one failed
            file.close()
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()
