"""`megasp preprocess`: text to token ids, as Megatron-LM's preprocess_data.py writes them.

    files -> documents -> batches of about a megabyte -> a pool of processes -> {prefix}_{key}_document.bin and .idx

Results are taken in the order of the input, so the output is the same for any number of workers.
"""

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.indexed_dataset import best_dtype
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.text_files import Document, InputOptions, find_files, read_documents, texts_of
from megasp.data.tokenizer import Tokenizer
from megasp.data.tokenizer_options import TokenizerOptions
from megasp.errors import DataError

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options(TokenizerOptions, InputOptions):
    """Preprocessing."""

    output_prefix: str = flag(REQUIRED, "output goes to PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    append_eod: bool = flag(False, "end each document with the end-of-document token")
    workers: int | None = flag(None, "processes that tokenize; one per CPU without it")
    log_interval: int = flag(1000, "documents between progress updates")


@dataclass
class Encoded:
    """What became of one document.

    Attributes:
        raw_bytes: its size.
        tokens: its ids for each key, in the dtype of the output; without any where its text is blank.
        error: why it cannot be used, instead of tokens: the parts of a DataError, which does not survive pickling.
    """

    raw_bytes: int
    tokens: list[np.ndarray]
    error: tuple[str, str, str] | None = None


@dataclass
class Totals:
    """Counts of documents read, bad documents, blank texts, and of bytes read and tokens written."""

    documents: int = 0
    bad: int = 0
    empty: int = 0
    raw_bytes: int = 0
    tokens: int = 0


def run(options: Options) -> int:
    """Tokenize all documents of the input.

    Raises:
        DataError: bad input (see `texts_of`), an id beyond the vocabulary, no document at all, output that exists or
            cannot be written. No output is left behind.
    """
    for name, value in (("--workers", options.workers), ("--log-interval", options.log_interval)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", "it must be at least 1", f"use {name} 1 or more, or leave it out")
    _tokenizer.cache_clear()
    dtype = best_dtype(_tokenizer(options).vocab_size)
    files = find_files(options.input, options.extensions)
    prefixes = [f"{options.output_prefix}_{key}_document" for key in options.json_keys]
    start = time.perf_counter()
    with ExitStack() as stack:
        builders = [stack.enter_context(IndexedDatasetBuilder(prefix, dtype)) for prefix in prefixes]
        totals = _write(options, files, builders)
        for builder in builders:
            if builder.num_documents == 0:
                got = f"no documents at all for {builder.prefix} ({totals.documents} read, {totals.bad} bad)"
                raise DataError(got, "a dataset needs one document with text", "check --input and --json-keys")
    if totals.bad:
        log.warning(f"left out {totals.bad:,} of {totals.documents:,} documents that are not valid text or JSON")
    if totals.empty:
        log.warning(f"left out {totals.empty:,} empty documents")
    megabytes, seconds = totals.raw_bytes / 1e6, time.perf_counter() - start
    log.info(
        f"{totals.documents - totals.bad:,} documents ({megabytes:,.1f} MB) gave {totals.tokens:,} tokens"
        f" in {seconds:.0f} s, {megabytes / seconds:.1f} MB/s"
    )
    for prefix in prefixes:
        log.info(f"wrote {prefix}.bin and .idx; next: megasp data inspect {prefix}")
    return 0


def _write(options: Options, files: Sequence[Path], builders: Sequence[IndexedDatasetBuilder]) -> Totals:
    """Add the documents of all files to the builders (one per key), with progress."""
    totals = Totals()
    size = sum(file.stat().st_size for file in files)
    results = closing(_encode_all(options, _batches(read_documents(files))))  # an error must end the pool at once
    with log.progress(None, "tokenizing", size, "B") as bar, results as all_encoded:
        for encoded in all_encoded:
            totals.documents += 1
            totals.raw_bytes += encoded.raw_bytes
            if totals.documents % options.log_interval == 0:
                bar.update(totals.raw_bytes - bar.n)
            if encoded.error:
                if not options.skip_bad_lines:
                    raise DataError(*encoded.error)
                totals.bad += 1
                continue
            for builder, tokens in zip(builders, encoded.tokens, strict=True):
                if len(tokens):
                    builder.add_document(tokens)
                    totals.tokens += len(tokens)
                else:
                    totals.empty += 1
        bar.update(totals.raw_bytes - bar.n)
    return totals


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of consecutive documents of about BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.raw)
        if size >= BATCH_BYTES or len(batch) >= 10_000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(options: Options, batches: Iterable[list[Document]]) -> Generator[Encoded, None, None]:
    """`encode` all batches by `options.workers` processes, in order, with at most two batches each in flight."""
    workers = options.workers or _cpus()
    if workers == 1:
        for batch in batches:
            yield from encode(options, batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _use_one_thread)
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


def _use_one_thread() -> None:
    """Keep the tokenizer of each of many processes to one thread."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@lru_cache(maxsize=1)
def _tokenizer(options: Options) -> Tokenizer:
    """The tokenizer, built once in each process."""
    tokenizer = options.build()
    if tokenizer is None:
        fix = "add --tokenizer-model PATH, or --tokenizer-type ByteTokenizer"
        raise DataError("no tokenizer is named", "text becomes token ids by a tokenizer", fix)
    return tokenizer


def encode(options: Options, documents: Sequence[Document]) -> list[Encoded]:
    """What becomes of each document, in order. All are tokenized together; if any is bad, one by one to learn which."""
    tokenizer = _tokenizer(options)
    try:
        texts = [text for document in documents for text in texts_of(document, options.json_keys)]
        ids = tokenizer.encode_batch(texts)
    except DataError as error:
        if len(documents) > 1:
            return [encoded for document in documents for encoded in encode(options, [document])]
        place, size = documents[0].place, len(documents[0].raw)
        return [Encoded(size, [], (f"{place}: {error.got}", error.rule, error.fix))]
    if options.append_eod:
        ids = [np.append(tokens, tokenizer.eod) if len(tokens) else tokens for tokens in ids]
    dtype, keys = best_dtype(tokenizer.vocab_size), len(options.json_keys)
    ids = [tokens.astype(dtype) for tokens in ids]
    return [Encoded(len(document.raw), ids[i * keys : (i + 1) * keys]) for i, document in enumerate(documents)]
