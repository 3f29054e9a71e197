"""`megasp data inspect`: what a dataset holds, at a glance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.document_lengths import SORTED, document_lengths, draw, histogram, looks_sorted, text
from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.packing import BestFit
from megasp.data.tokenizer_options import TokenizerOptions
from megasp.errors import DataError

PREVIEW = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Options(TokenizerOptions):
    """Dataset inspection."""

    prefix: str = flag(
        REQUIRED, "path of the .bin and .idx files without these endings", name="prefix", metavar="PREFIX"
    )
    documents: int = flag(3, "documents to preview, evenly spaced")
    seq_length: int | None = flag(None, "say what --document-packing would cut and pad in samples of so many tokens")
    picture: str | None = flag(
        None, "draw the lengths of documents into this .png, .svg or .pdf (needs matplotlib)", metavar="FILE"
    )


def run(options: Options) -> int:
    """Print counts, the lengths of documents, and a preview; warn if the order of documents looks sorted."""
    if options.seq_length is not None and options.seq_length < 1:
        raise DataError(f"--seq-length is {options.seq_length}", "a sample has tokens", "use 1 or more")
    corpus = IndexedDataset(options.prefix)
    tokenizer = options.build()
    log.info(
        f"{options.prefix}: {corpus.num_documents:,} documents, {len(corpus):,} sequences, {corpus.num_tokens:,} tokens"
        f" of {corpus.dtype}, {corpus.num_tokens * corpus.dtype.itemsize / 1e6:,.1f} MB, id {corpus.fingerprint()}"
    )
    if corpus.num_documents == 0:
        return 0
    lengths = document_lengths(corpus)
    marks = " ".join(f"{name} {value:,.0f}" for name, value in _quantiles(lengths))
    log.info(f"tokens in a document: {marks}, mean {lengths.mean():,.1f}, empty {np.count_nonzero(lengths == 0):,}")
    rows = histogram(lengths)
    for line in text(rows):
        log.info(line)
    if options.seq_length is not None and corpus.num_tokens:
        log.info(_packing(corpus, lengths, options.seq_length))
    if options.picture and rows:
        title = f"{Path(options.prefix).name}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens"
        draw(rows, title, options.picture, options.seq_length)
        log.info(f"wrote {options.picture}")
    for document in np.unique(np.linspace(0, corpus.num_documents - 1, max(0, options.documents)).astype(int)).tolist():
        start, stop = corpus.document_range(document)
        ids = corpus.tokens(start, min(stop, start + PREVIEW))
        shown = repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))
        log.info(f"document {document}: {shown}{' ...' if stop - start > PREVIEW else ''}")
    if looks_sorted(lengths):
        log.warning(f"{options.prefix} {SORTED}")
    log.info(f"next: megasp data verify {options.prefix}, or train with --data-path {options.prefix}")
    return 0


def _quantiles(lengths: np.ndarray) -> list[tuple[str, float]]:
    names = ("shortest", "10%", "median", "90%", "longest")
    return list(zip(names, np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1)), strict=True))


def _packing(corpus: IndexedDataset, lengths: np.ndarray, seq_length: int) -> str:
    """What --document-packing would make of the documents, in words."""
    nonempty = lengths[lengths > 0]
    longer = np.count_nonzero(nonempty > seq_length) / len(nonempty)
    by_stream = np.minimum(1, (nonempty - 1) / seq_length).mean()  # the next cut is anywhere in the next seq_length
    padding = BestFit(corpus, 0, corpus.num_tokens, seq_length).padding
    return (
        f"in samples of {seq_length:,} tokens --document-packing stream cuts about {by_stream:.1%} of the documents "
        f"and pads nothing; best-fit cuts {longer:.1%}, those that are longer, and {padding:.2%} of its tokens are "
        "padding"
    )
