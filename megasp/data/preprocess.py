"""`megasp preprocess`: text to token ids, as Megatron-LM's preprocess_data.py writes them.

    files -> documents -> a pool of processes -> chunks -> {prefix}_{key}_document.bin and .idx

Results are taken in the order of the input, so the output is the same for any number of workers. They are kept in
chunks, in PREFIX.preprocess/, until all input is read: a run that was killed goes on after its last whole chunk, and
ends with the same bytes.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.chunks import Chunks, Totals
from megasp.data.encoding import Encoded, EncodingOptions, batches, encode_all, tokenizer_of
from megasp.data.indexed_dataset import best_dtype
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.text_files import STDIN, Document, find_files, read_documents
from megasp.errors import DataError

CHUNK_BYTES = 1 << 28  # of input


@dataclass(frozen=True, kw_only=True)
class Options(EncodingOptions):
    """Preprocessing."""

    output_prefix: str = flag(REQUIRED, "output goes to PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    shuffle: bool = flag(False, "shuffle the documents; training shuffles samples, but never documents")
    shuffle_seed: int = flag(1234, "seed of --shuffle")
    log_interval: int = flag(1000, "documents between progress updates")


def run(options: Options) -> int:
    """Tokenize all documents of the input.

    Raises:
        DataError: bad input (see `texts_of`), an id beyond the vocabulary, no document at all, output that exists or
            cannot be written. No output is left behind.
    """
    for name, value in (("--workers", options.workers), ("--log-interval", options.log_interval)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", "it must be at least 1", f"use {name} 1 or more, or leave it out")
    tokenizer_of.cache_clear()
    tokenizer_of(options)
    files = find_files(options.input, options.extensions, options.exclude)
    prefixes = [f"{options.output_prefix}_{key}_document" for key in options.json_keys]
    start = time.perf_counter()
    chunks = Chunks(options.output_prefix, prefixes, _signature(options, files))
    before = chunks.totals.raw_bytes
    try:
        if not chunks.complete:
            _write(options, files, chunks)
        totals = chunks.totals
        for prefix, count in zip(prefixes, totals.kept, strict=True):
            if count == 0:
                got = f"no documents at all for {prefix} ({totals.documents} read, {totals.bad} bad)"
                raise DataError(got, "a dataset needs one document with text", "check --input and --json-keys")
        chunks.finish(options.shuffle_seed if options.shuffle else None)
    except Exception:
        chunks.remove()  # only a run that was killed or interrupted can go on
        raise
    if totals.bad:
        log.warning(f"left out {totals.bad:,} of {totals.documents:,} documents that are not valid text or JSON")
    if totals.empty:
        log.warning(f"left out {totals.empty:,} empty documents")
    megabytes, seconds = (totals.raw_bytes - before) / 1e6, time.perf_counter() - start
    log.info(
        f"{totals.documents - totals.bad:,} documents ({totals.raw_bytes / 1e6:,.1f} MB) gave {totals.tokens:,} tokens"
        f" in {seconds:.0f} s, {megabytes / seconds:.1f} MB/s"
    )
    for prefix in prefixes:
        log.info(f"wrote {prefix}.bin and .idx; next: megasp data inspect {prefix}")
    return 0


def _signature(options: Options, files: Sequence[Path]) -> dict[str, object]:
    """What the output depends on: a run goes on only where all of it is as it was."""
    named = (options.tokenizer_model, options.vocab_file, options.merge_file)
    watched = [*files, *(Path(name) for name in named if name)]
    stats = [(str(path), path.stat()) for path in watched if path != STDIN]
    same = (
        "tokenizer_type",
        "tiktoken_pattern",
        "vocab_size",
        "eod_token",
        "json_keys",
        "skip_bad_lines",
        "append_eod",
    )
    return {name: getattr(options, name) for name in same} | {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "chunk_bytes": CHUNK_BYTES,
    }


def _write(options: Options, files: Sequence[Path], chunks: Chunks) -> None:
    """Tokenize what the chunks do not hold yet, with progress."""
    tokenizer = tokenizer_of(options)
    documents = _after(read_documents(files, options.json_keys, tokenizer.last_cut), chunks.totals.documents)
    on_disk = None if STDIN in files else sum(file.stat().st_size for file in files)
    results = closing(encode_all(options, batches(documents)))  # an error must end the pool at once
    with log.progress(None, "tokenizing", on_disk, "B") as bar, results as all_encoded:
        encoded = _until_bad(all_encoded)
        while not chunks.complete:
            totals = chunks.totals.copy()
            with ExitStack() as stack:
                dtype = best_dtype(tokenizer.vocab_size)
                builders = [stack.enter_context(IndexedDatasetBuilder(path, dtype)) for path in chunks.next_paths()]
                stop = totals.raw_bytes + CHUNK_BYTES
                more = False
                for one in encoded:
                    _add(one, builders, totals, options.skip_bad_lines)
                    if totals.documents % options.log_interval == 0 or not one.ends:
                        bar.update((one.read or totals.raw_bytes) - bar.n)
                    if totals.raw_bytes >= stop and one.ends:
                        more = True
                        break
            chunks.add(totals, complete=not more)


def _after(documents: Iterator[Document], count: int) -> Iterator[Document]:
    """The documents after the first `count`."""
    skipped = 0
    while skipped < count:
        skipped += next(documents).ends
    return islice(documents, None)


def _until_bad(parts: Iterable[Encoded]) -> Iterator[Encoded]:
    """Of a document with a bad part nothing after that part, which ends it: what is left out is left out whole."""
    bad = False
    for part in parts:
        bad = bad and not part.begins
        if not bad:
            bad = part.error is not None
            part.ends = part.ends or bad
            yield part


def _add(encoded: Encoded, builders: Sequence[IndexedDatasetBuilder], totals: Totals, skip_bad: bool) -> None:
    """Add a document, or a part of one, to the builders (one per key)."""
    totals.raw_bytes += encoded.size
    totals.documents += encoded.ends
    if encoded.error:
        if not skip_bad:
            raise DataError(*encoded.error)
        totals.bad += 1
        for builder in builders:
            builder.drop_document()
        return
    for key, (builder, tokens) in enumerate(zip(builders, encoded.tokens, strict=True)):
        builder.extend_document(tokens)
        if encoded.ends:
            count = builder.end_document()
            totals.tokens += count
            totals.kept[key] += count > 0
            totals.empty += count == 0
