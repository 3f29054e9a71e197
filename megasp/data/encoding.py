"""Documents to token ids by a pool of processes, in order.

documents -> batches of about a megabyte -> a pool of processes -> `Encoded`, one for each document or part of one
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np

from megasp.config.flags import flag
from megasp.data.indexed_dataset import best_dtype
from megasp.data.text_files import Document, InputOptions, texts_of
from megasp.data.tokenizer import NullTokenizer, Tokenizer
from megasp.data.tokenizer_options import TokenizerOptions
from megasp.errors import DataError

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(TokenizerOptions, InputOptions):
    """Tokenizing."""

    append_eod: bool = flag(False, "end each document with the end-of-document token")
    workers: int | None = flag(None, "processes that tokenize; one per CPU without it")


class Encoded:
    """What became of one document, or of a part of one.

    Attributes:
        size, read, begins, ends: the document's.
        tokens: its ids for each key, in the dtype of the output; without any where its text is blank.
        error: why it cannot be used, instead of tokens: the parts of a DataError, which does not survive pickling.
    """

    def __init__(self, document: Document, tokens: list[np.ndarray], error: tuple[str, str, str] | None = None) -> None:
        self.size, self.read, self.begins, self.ends = document.size, document.read, document.begins, document.ends
        self.tokens, self.error = tokens, error


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of consecutive documents of about BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES or len(batch) >= 10_000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(options: EncodingOptions, batches: Iterable[list[Document]]) -> Generator[Encoded, None, None]:
    """`encode` all batches by `options.workers` processes, in order, with at most two batches each in flight."""
    workers = options.workers or _cpus()
    if workers == 1:
        for batch in batches:
            yield from encode(options, batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(encode, options, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        got = f"one of {workers} tokenizing processes died"
        raise DataError(got, "all of them must fit in memory", "use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cpus() -> int:
    """CPUs that this process may use (macOS knows only how many there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker() -> None:
    """Keep the tokenizer of each of many processes to one thread, and end this process when its parent ends: a killed
    parent says nothing, and its workers would wait for work for ever.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def tokenizer_of(options: EncodingOptions) -> Tokenizer:
    """The tokenizer, built once in each process."""
    tokenizer = options.build()
    if tokenizer is None:
        fix = "add --tokenizer-model PATH, or --tokenizer-type ByteTokenizer"
        raise DataError("no tokenizer is named", "text becomes token ids by a tokenizer", fix)
    return tokenizer


def encode(options: EncodingOptions, documents: Sequence[Document]) -> list[Encoded]:
    """What becomes of each document, in order. All are tokenized together; if any is bad, one by one to learn which."""
    tokenizer, keys = tokenizer_of(options), len(options.json_keys)
    dtype = best_dtype(tokenizer.vocab_size)
    try:
        texts = [
            text for document in documents if document.ids is None for text in texts_of(document, options.json_keys)
        ]
        from_text = iter(tokenizer.encode_batch(texts))
        found = []
        for document in documents:
            if document.ids is None:
                ids = [next(from_text) for _ in range(keys)]
            else:
                ids = [_given_ids(tokenizer, document.ids), *[np.empty(0, np.int64)] * (keys - 1)]
            if options.append_eod and document.ends:  # blank text stays empty, but the last part of a document ends it
                in_parts = [key == 0 and not document.begins for key in range(keys)]  # other keys' texts are whole
                ids = [
                    np.append(part, tokenizer.eod) if len(part) or partial else part
                    for part, partial in zip(ids, in_parts, strict=True)
                ]
            found.append(Encoded(document, [tokens.astype(dtype) for tokens in ids]))
        return found
    except DataError as error:
        if len(documents) > 1:
            return [encoded for document in documents for encoded in encode(options, [document])]
        place = documents[0].place
        return [Encoded(documents[0], [], (f"{place}: {error.got}", error.rule, error.fix))]


def _given_ids(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Ids of a .npy file, all of them in the vocabulary."""
    if not isinstance(tokenizer, NullTokenizer):
        fix = "use --tokenizer-type NullTokenizer --vocab-size N"
        raise DataError("token ids in a .npy file", "they need no tokenizer but NullTokenizer", fix)
    return tokenizer.checked(ids.astype(np.int64))
