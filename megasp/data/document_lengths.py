"""How long the documents of a corpus are: a histogram as text and as a picture, and whether they look sorted."""

from typing import NamedTuple

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.errors import DataError

PROBES = 1000  # documents that `looks_sorted` is asked about when a run starts

SORTED = (
    "looks sorted, or grouped by source: the lengths of documents depend on their place. Training shuffles samples, "
    "not documents, and --split takes validation and test from the end of the file, which is then other text than "
    "training's; make it again with `megasp preprocess --shuffle`"
)
"""What to say of a corpus that `looks_sorted`."""


def document_lengths(corpus: IndexedDataset) -> np.ndarray:
    """Tokens of each document, int64; reads the whole index."""
    return np.diff(corpus.document_bounds(0, corpus.num_documents))


def some_lengths(corpus: IndexedDataset) -> np.ndarray:
    """Tokens of PROBES evenly spaced documents, or of all if they are fewer, int64 in file order."""
    count = corpus.num_documents
    chosen = np.unique(np.linspace(0, count - 1, min(count, PROBES)).astype(int))
    ranges = [corpus.document_range(document) for document in chosen.tolist()]
    return np.array([stop - start for start, stop in ranges], np.int64)


def looks_sorted(lengths: np.ndarray, groups: int = 10) -> bool:
    """Whether the lengths of documents, in file order, depend on their place in the file.

    Cut into ten runs of neighbours, a shuffled corpus has runs of like mean log length: between them lies a share of
    about 9 / documents of the variance. A tenth or more tells of sorting, or of sources one after the other.
    """
    if len(lengths) < 20 * groups or lengths.min() == lengths.max():
        return False
    logs = np.log1p(lengths)
    runs = np.array_split(logs, groups)
    between = sum(len(run) * (run.mean() - logs.mean()) ** 2 for run in runs)
    return bool(between > 0.1 * len(logs) * logs.var())


class Doubling(NamedTuple):
    """The documents of `first` to 2 x first - 1 tokens: how many, their share of all tokens."""

    first: int
    documents: int
    share: float

    @property
    def span(self) -> str:
        return f"{self.first:,}-{2 * self.first - 1:,}"


def histogram(lengths: np.ndarray) -> list[Doubling]:
    """The doublings from the shortest to the longest document; empty documents are left out."""
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return []
    doublings = np.frexp(lengths.astype(float))[1] - 1  # floor(log2), exactly
    first = int(doublings.min())
    shares = np.bincount(doublings - first, lengths) / lengths.sum()
    counts = np.bincount(doublings - first)
    return [
        Doubling(1 << first + i, count, share)
        for i, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True))
    ]


def text(rows: list[Doubling], width: int = 40) -> list[str]:
    """A histogram for a terminal: a row for each doubling, bars for their share of the tokens.

    tokens        documents       share of all tokens
       512-1,023      1,204   21%  #################
    """
    lines = ["tokens in a document      documents  share of all tokens"]
    for row in rows:
        bar = "#" * round(width * row.share / max(each.share for each in rows))
        lines.append(f"{row.span:>22} {row.documents:>12,} {row.share:>6.1%} {bar}".rstrip())
    return lines


def draw(rows: list[Doubling], title: str, file: str, seq_length: int | None = None) -> None:
    """A histogram as a picture: for each doubling its share of the documents and of the tokens.

    Args:
        file: .png, .svg or .pdf.
        seq_length: marked by a line; documents to its right are cut by any packing.

    Raises:
        DataError: matplotlib is missing or knows no such format.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError(f"--picture {file}", "pictures are drawn by matplotlib", "pip install matplotlib") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    places = np.log2([row.first for row in rows])  # a doubling lies between its own number and the next
    documents = np.array([row.documents for row in rows])
    axes.bar(places + 0.3, documents / documents.sum(), 0.4, color="#b7cfe8", label="share of documents")
    axes.bar(places + 0.7, [row.share for row in rows], 0.4, color="#3b6ea5", label="share of tokens")
    axes.set_xticks(places, [f"{row.first:,}" for row in rows], rotation=45)
    axes.yaxis.set_major_formatter("{x:.0%}")
    if seq_length is not None:
        axes.axvline(np.log2(seq_length), color="#c0392b", label=f"--seq-length {seq_length:,}")
    axes.set(title=title, xlabel="tokens in a document, by doublings")
    axes.legend()
    try:
        with rc_context({"svg.fonttype": "none"}):  # text, not outlines
            figure.savefig(file)
    except ValueError as error:
        raise DataError(f"--picture {file}", str(error), "end its name in .png, .svg or .pdf") from None
