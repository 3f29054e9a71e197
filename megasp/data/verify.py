"""`megasp data verify`: reads every byte of a dataset and checks what opening it does not."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.indexed_dataset import IndexedDataset

CHUNK = 1 << 22  # entries read at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """Dataset verification."""

    prefix: str = flag(
        REQUIRED, "path of the .bin and .idx files without these endings", name="prefix", metavar="PREFIX"
    )
    vocab_size: int | None = flag(None, "bound that all token ids must keep; not checked without it")


def run(options: Options) -> int:
    """Print each problem. Exit status 0 without any, else 1."""
    corpus = IndexedDataset(options.prefix)
    count = 0
    for problem in problems(corpus, options.vocab_size):
        log.warning(f"{options.prefix}: {problem}")
        count += 1
    if count == 0:
        log.info(f"{options.prefix}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens, all in order")
    return 1 if count else 0


def problems(corpus: IndexedDataset, vocab_size: int | None = None) -> Iterator[str]:
    """The first problem of each kind, in words."""
    yield from _sequence_problem(corpus)
    for start in range(0, len(corpus.document_indices) - 1, CHUNK):
        falls = np.flatnonzero(np.diff(corpus.document_indices[start : start + CHUNK + 1]) < 0)
        if len(falls):
            yield f"document {start + falls[0]} ends before it begins"
            break
    yield from _token_problem(corpus, vocab_size)


def _sequence_problem(corpus: IndexedDataset) -> Iterator[str]:
    """Each sequence must begin where the one before it ends."""
    end = 0
    for start in range(0, len(corpus), CHUNK):
        lengths = corpus.sequence_lengths[start : start + CHUNK].astype(np.int64)
        ends = end + np.cumsum(lengths) * corpus.dtype.itemsize
        pointers = corpus.sequence_pointers[start : start + CHUNK]
        expected = np.concatenate([[end], ends[:-1]])
        bad = np.flatnonzero((pointers != expected) | (lengths < 0))
        if len(bad):
            i = int(bad[0])
            yield (
                f"sequence {start + i} has length {lengths[i]} at byte {pointers[i]}, "
                f"but the one before it ends at byte {expected[i]}"
            )
            return
        end = int(ends[-1])


def _token_problem(corpus: IndexedDataset, vocab_size: int | None) -> Iterator[str]:
    """Each token id must lie in [0, vocab_size); all are read even without a bound, so that a bad disk shows."""
    with log.progress(None, "reading", corpus.num_tokens, "tokens") as bar:
        for start in range(0, corpus.num_tokens, CHUNK):
            ids = corpus.tokens(start, min(corpus.num_tokens, start + CHUNK))
            low, high = ids.min(), ids.max()
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                outside = (ids < 0) | (ids > (high if vocab_size is None else vocab_size - 1))
                i = int(np.flatnonzero(outside)[0])
                document = corpus.document_at(start + i)
                bound = "" if vocab_size is None else f" and below {vocab_size}"
                yield f"token {start + i} (document {document}) is {ids[i]}, but ids must be 0 or more{bound}"
                return
            bar.update(len(ids))
