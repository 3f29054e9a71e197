"""Documents of some corpora in a keyed random order, in bounded memory."""

from collections.abc import Sequence

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.data.sample_order import SampleOrder

BUFFER = 1 << 28  # bytes of tokens in memory
LONG = 1 << 20  # bytes of a document that is copied piece by piece instead


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
        numbers = np.searchsorted(firsts, sources, side="right") - 1
        places = [
            (parts[number], *parts[number].document_range(int(source - firsts[number])))
            for number, source in zip(numbers.tolist(), sources, strict=True)
        ]
        short: dict[int, np.ndarray] = {}
        for i in np.argsort(sources).tolist():
            part, first, stop = places[i]
            if (stop - first) * builder.dtype.itemsize <= LONG:
                short[i] = part.tokens(first, stop)
        for i, (part, first, stop) in enumerate(places):
            if i in short:
                builder.add_document(short.pop(i))
                continue
            for begin in range(first, stop, LONG):
                builder.extend_document(part.tokens(begin, min(stop, begin + LONG)))
            builder.end_document()
