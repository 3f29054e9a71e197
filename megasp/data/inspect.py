"""`megasp data inspect`: what a dataset holds, at a glance."""

from dataclasses import dataclass

import numpy as np

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.tokenizer_options import TokenizerOptions

PREVIEW = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Options(TokenizerOptions):
    """Dataset inspection."""

    prefix: str = flag(
        REQUIRED, "path of the .bin and .idx files without these endings", name="prefix", metavar="PREFIX"
    )
    documents: int = flag(3, "documents to preview, evenly spaced")


def run(options: Options) -> int:
    """Print counts, the lengths of documents, and a preview; warn if the order of documents looks sorted."""
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
    for line in histogram(lengths):
        log.info(line)
    for document in np.unique(np.linspace(0, corpus.num_documents - 1, max(0, options.documents)).astype(int)).tolist():
        start, stop = corpus.document_range(document)
        ids = corpus.tokens(start, min(stop, start + PREVIEW))
        shown = repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))
        log.info(f"document {document}: {shown}{' ...' if stop - start > PREVIEW else ''}")
    if looks_sorted(lengths):
        log.warning(
            "the documents look sorted or grouped by source: their lengths depend on their place. Only samples are "
            "shuffled, and validation is taken from the end of the file; shuffle the input before preprocessing"
        )
    log.info(f"next: megasp data verify {options.prefix}, or train with --data-path {options.prefix}")
    return 0


def document_lengths(corpus: IndexedDataset) -> np.ndarray:
    """Tokens of each document, int64; reads the whole index."""
    ends = np.concatenate([[0], np.cumsum(corpus.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[corpus.document_indices])


def _quantiles(lengths: np.ndarray) -> list[tuple[str, float]]:
    names = ("shortest", "10%", "median", "90%", "longest")
    return list(zip(names, np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1)), strict=True))


def histogram(lengths: np.ndarray, width: int = 40) -> list[str]:
    """A picture of document lengths: a row for each doubling, documents counted, bars for their share of the tokens.

    tokens        documents       share of all tokens
       512-1,023      1,204   21%  #################
    """
    lengths = lengths[lengths > 0]
    doublings = np.frexp(lengths.astype(float))[1] - 1  # floor(log2), exactly
    rows = ["tokens in a document      documents  share of all tokens"]
    if not len(lengths):
        return rows
    first, last = int(doublings.min()), int(doublings.max())
    tokens = np.bincount(doublings - first, lengths) / lengths.sum()
    counts = np.bincount(doublings - first)
    for doubling in range(first, last + 1):
        share, count = float(tokens[doubling - first]), int(counts[doubling - first])
        span = f"{2**doubling:,}-{2 ** (doubling + 1) - 1:,}"
        bar = "#" * round(width * share / float(tokens.max()))
        rows.append(f"{span:>22} {count:>12,} {share:>6.1%} {bar}".rstrip())
    return rows


def looks_sorted(lengths: np.ndarray, groups: int = 10) -> bool:
    """Whether the lengths of documents depend on their place in the file.

    Cut into ten runs of neighbours, a shuffled corpus has runs of like mean log length: between them lies a share of
    about 9 / documents of the variance. A tenth or more tells of sorting, or of sources one after the other.
    """
    if len(lengths) < 20 * groups or lengths.min() == lengths.max():
        return False
    logs = np.log1p(lengths)
    runs = np.array_split(logs, groups)
    between = sum(len(run) * (run.mean() - logs.mean()) ** 2 for run in runs)
    return bool(between > 0.1 * len(logs) * logs.var())
