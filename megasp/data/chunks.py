"""Output that is collected in chunks, so that a killed run can go on, and appears whole or not at all.

PREFIX.preprocess/state.json        what was read into the whole chunks, and by which options
PREFIX.preprocess/00000_0.bin .idx  chunk 0 of the first key, an indexed dataset of its own
PREFIX.preprocess/final_0.bin .idx  all of it, when the chunks are complete; renamed to its own name
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from megasp import log
from megasp.data.atomic_files import AtomicFiles
from megasp.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.shuffle import add_shuffled
from megasp.errors import DataError


@dataclass
class Totals:
    """Counts of documents read, bad documents, blank texts, documents kept for each key; bytes read, tokens written."""

    documents: int = 0
    bad: int = 0
    empty: int = 0
    raw_bytes: int = 0
    tokens: int = 0
    kept: list[int] = field(default_factory=list)

    def copy(self) -> Self:
        return replace(self, kept=list(self.kept))


class Chunks:
    """The chunks of one output.

    Args:
        prefix: of the output; the chunks lie in PREFIX.preprocess/.
        outputs: prefix of each dataset to write, one for each key.
        signature: what the content depends on. Chunks of another signature are thrown away.

    Attributes:
        totals: of the whole chunks.
        complete: whether they hold all input.

    Raises:
        DataError: an output exists, or the directory cannot be written.
    """

    def __init__(self, prefix: str, outputs: Sequence[str], signature: Mapping[str, Any]) -> None:
        self.directory, self.outputs = Path(f"{prefix}.preprocess"), outputs
        self.totals, self.complete, self._count = Totals(kept=[0] * len(outputs)), False, 0
        self._signature = json.loads(json.dumps(signature))
        state = self._read()
        for path in (path(output) for output in outputs for path in (bin_path, idx_path)):
            if path.exists() and not (state and state["complete"]):
                raise DataError(f"{path} exists", "existing output is never overwritten", "remove it or name another")
        if state is not None:
            self.totals, self.complete, self._count = Totals(**state["totals"]), state["complete"], state["chunks"]
            log.info(f"going on after {self.totals.documents:,} documents that {self.directory} holds")
            return
        self.remove()
        try:
            self.directory.mkdir(parents=True)
        except OSError as error:
            got = f"cannot write to {self.directory.parent} ({error.strerror})"
            raise DataError(got, "the output's directory must be writable", "name a directory of your own") from None

    def _read(self) -> dict[str, Any] | None:
        """The state of an earlier run of the same options and input, if there is one."""
        try:
            state = json.loads((self.directory / "state.json").read_bytes())
        except (OSError, ValueError):
            return None
        if state["signature"] != self._signature:
            log.info(f"{self.directory} is of other input or options: starting anew")
            return None
        return dict(state)

    def next_paths(self) -> list[Path]:
        """Prefix of the next chunk for each key; what a killed run left of it is removed."""
        name = f"{self._count:05}_"
        for path in [*self.directory.glob(f"{name}*"), *self.directory.glob(".*.partial")]:
            path.unlink()
        return [self.directory / f"{name}{key}" for key in range(len(self.outputs))]

    def add(self, totals: Totals, complete: bool) -> None:
        """Count the next chunk among the whole ones."""
        self.totals, self.complete, self._count = totals, complete, self._count + 1
        state = {"signature": self._signature, "chunks": self._count, "complete": complete, "totals": asdict(totals)}
        with AtomicFiles(self.directory / "state.json", overwrite=True) as output:
            output.files[0].write(json.dumps(state).encode())

    def finish(self, shuffle_seed: int | None) -> None:
        """Put the chunks together, shuffled if there is a seed, give the output its names, and remove the chunks."""
        for key, output in enumerate(self.outputs):
            final = self.directory / f"final_{key}"
            parts = [self.directory / f"{number:05}_{key}" for number in range(self._count)]
            if not idx_path(final).exists() and not idx_path(output).exists():
                for path in [bin_path(final), *self.directory.glob(".*.partial")]:
                    path.unlink(missing_ok=True)
                with IndexedDatasetBuilder(final, IndexedDataset(parts[0]).dtype) as builder:
                    if shuffle_seed is not None:
                        add_shuffled(builder, [IndexedDataset(part) for part in parts], shuffle_seed)
                    else:
                        for part in parts:
                            builder.add_index(part)
        for key, output in enumerate(self.outputs):
            for name in (bin_path, idx_path):  # readers look for the index first, so it comes last
                made = name(self.directory / f"final_{key}")
                if made.exists():
                    made.replace(name(output))
        self.remove()

    def remove(self) -> None:
        """Remove the chunks."""
        shutil.rmtree(self.directory, ignore_errors=True)
