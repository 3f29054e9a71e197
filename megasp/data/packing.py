"""Best-fit packing (`--document-packing best-fit`): documents stay whole where they fit into a sample.

    documents of lengths 9 3 5 2 6, samples of 8 tokens, "." is padding:
    stream      |aaaaaaaa|abbbcccc|cddeeeee|e        cuts a, c and e
    best-fit    |aaaaaaaa|ddeeeeee|bbbccccc|a.......|   cuts only a, which is longer than a sample

A document of more than L tokens fills samples of its own, L tokens each; what is left of it is packed with the shorter
documents. These are taken from the longest to the shortest, and each goes where it leaves the least room (best-fit
decreasing), among the samples of one window of neighbouring documents. H. Ding et al., "Fewer Truncations Improve
Language Modeling", arXiv 2404.10830, section 3, pack whole corpora; windows cost up to a percent of padding, and let a
sample be found, and its documents be neighbours on the disk, without a table of documents by length.

What is held: for each document 2 bytes (its sample in the window), for each window 8 (its first sample). It takes one
pass over the index, about a second for 5 million documents, when a dataset is opened; nothing is stored.
"""

from functools import lru_cache

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.sample_order import SampleOrder
from megasp.data.token_stream import Ranges

SAMPLES = 128  # in a window, about
DOCUMENTS = (256, 1 << 14)  # in a window: fewest and most
BLOCK = 1 << 18  # documents packed at a time


class BestFit:
    """Tokens [start, stop) of a corpus as samples of `length` tokens, documents whole where they fit.

    Attributes:
        samples: how many there are.
        padding: the share of them that is padding.
    """

    def __init__(self, corpus: IndexedDataset, start: int, stop: int, length: int) -> None:
        self.corpus, self.start, self.stop, self.length = corpus, start, stop, length
        self._window, self._first, self._bins, self._firsts = _packed(
            corpus.prefix, corpus.fingerprint(), start, stop, length
        )
        self.samples = int(self._firsts[-1])
        self.padding = 1 - (stop - start) / max(1, len(self))

    def __len__(self) -> int:
        """Tokens of all samples, padding among them."""
        return self.samples * self.length

    def fingerprint(self) -> str:
        """An id of all that the samples depend on."""
        return f"{self.corpus.fingerprint()}:{self.start}-{self.stop}:best-fit-{self.length}"

    def cut(self, order: SampleOrder, slot: int, offset: int, count: int) -> Ranges:
        """The sample that comes `offset` tokens, padding included, into an epoch that reads samples in `order`."""
        assert slot == count == self.length and offset % slot == 0, (slot, offset, count, self.length)
        return self.sample(order(offset // slot))

    def sample(self, number: int) -> Ranges:
        """The documents of sample `number`; a last label only where a document goes on after the sample's end."""
        window = int(np.searchsorted(self._firsts, number, side="right")) - 1
        number -= int(self._firsts[window])
        first = window * self._window
        bins = self._bins[first : first + self._window]
        begins, ends = _documents(self.corpus, self._first + first, len(bins), self.start, self.stop)
        full = (ends - begins) // self.length
        until = np.cumsum(full)
        if number < until[-1]:
            document = int(np.searchsorted(until, number, side="right"))
            begin = int(begins[document]) + (number - int(until[document] - full[document])) * self.length
            return ((begin, min(begin + self.length + 1, int(ends[document]))),)
        begins += full * self.length
        held = np.flatnonzero((bins == number - until[-1]) & (begins < ends))
        return tuple(zip(begins[held].tolist(), ends[held].tolist(), strict=True))


def _documents(corpus: IndexedDataset, first: int, count: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in [start, stop) at which `count` documents begin and end, int64 [count] each."""
    bounds = np.clip(corpus.document_bounds(first, first + count), start, stop)
    return bounds[:-1].copy(), bounds[1:]


@lru_cache(maxsize=256)
def _packed(
    prefix: str, fingerprint: str, start: int, stop: int, length: int
) -> tuple[int, int, np.ndarray, np.ndarray]:
    """(documents in a window, the first document, each document's sample in its window, each window's first sample)."""
    corpus = IndexedDataset(prefix)
    if start == stop:
        return 1, 0, np.empty(0, np.uint16), np.zeros(1, np.int64)
    first, last = corpus.document_at(start), corpus.document_at(stop - 1) + 1
    wanted = -(-SAMPLES * length * (last - first) // (stop - start))
    window = int(np.clip(wanted, *DOCUMENTS))
    bins, counts = np.empty(last - first, np.uint16), [0]
    rows = max(1, BLOCK // window)
    for block in range(0, last - first, rows * window):
        count = min(rows * window, last - first - block)
        begins, ends = _documents(corpus, first + block, count, start, stop)
        lengths = np.zeros((-(-count // window), window), np.int64)
        lengths.flat[:count] = ends - begins
        packed, used = best_fit(lengths % length, length)
        bins[block : block + count] = packed.ravel()[:count]
        counts += ((lengths // length).sum(1) + used).tolist()
    return window, first, bins, np.cumsum(counts, dtype=np.int64)


forget_packings = _packed.cache_clear


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing of the rows of `lengths`, all at once.

    Args:
        lengths: [rows, items], below `capacity`; zeros are nothing to pack.

    Returns:
        The bin of each item, [rows, items]; those used in each row, [rows].
    """
    order = np.argsort(-lengths, axis=1, kind="stable")
    # A length taken from less room wraps to more than any bin can have, so the least room is the best fit.
    dtype = np.uint16 if capacity < 1 << 15 else np.uint32 if capacity < 1 << 31 else np.uint64
    longest_first = np.ascontiguousarray(np.take_along_axis(lengths, order, axis=1).astype(dtype).T)
    most = min(lengths.shape[1], 2 * int(lengths.sum(1).max()) // capacity + 1)  # any two bins hold more than one can
    room = np.full((len(lengths), max(1, most)), capacity, dtype)
    bins, rows = np.zeros(lengths.shape, np.uint16), np.arange(len(lengths))
    for item, places in zip(longest_first, order.T, strict=True):
        if not item.any():
            break
        left = room - item[:, None]
        best = left.argmin(axis=1)
        room[rows, best] = left[rows, best]
        bins[rows, places] = best
    return bins, np.count_nonzero(room < capacity, axis=1)
