"""Documents of some corpora in a keyed random order, in bounded memory."""

from collections.abc import Sequence

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.sample_order import SampleOrder

BUFFER = 1 << 28  # bytes of tokens in memory
LONG = 1 << 20  # bytes of a document that is copied from file to file instead


def add_shuffled(builder: IndexedDatasetBuilder, parts: Sequence[IndexedDataset], seed: int) -> None:
    """Add all documents of `parts` in the order of `seed`, which depends on nothing but their number.

    The output is made buffer by buffer; each is gathered in the order in which its documents lie in the parts, so a
    disk is swept once a buffer rather than sought once a document.
    """
    firsts = np.concatenate([[0], np.cumsum([part.num_documents for part in parts])])
    order = SampleOrder(max(1, int(firsts[-1])), seed, "documents", 0)
    mean = max(1, sum(part.num_tokens for part in parts) * builder.dtype.itemsize // max(1, int(firsts[-1])))
    count = max(1, BUFFER // mean)
    for start in range(0, int(firsts[-1]), count):
        sources = order.many(np.arange(start, min(int(firsts[-1]), start + count)))
        documents: list[np.ndarray] = [np.empty(0)] * len(sources)
        for place in np.argsort(sources).tolist():
            number = int(np.searchsorted(firsts, sources[place], side="right")) - 1
            part = parts[number]
            tokens = part.tokens(*part.document_range(int(sources[place] - firsts[number])))
            documents[place] = np.array(tokens) if tokens.nbytes <= LONG else tokens
        for tokens in documents:
            builder.add_document(tokens)
