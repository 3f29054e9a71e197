"""A range of a corpus as a circle of tokens, and samples that are cut from it."""

from dataclasses import dataclass

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.sample_order import SampleOrder

Ranges = tuple[tuple[int, int], ...]
"""Tokens [start, stop) of a corpus, in the order in which they are read."""

PADDING = 0
"""The id that fills a sample up: causal attention hides it from all before it, and its labels do not count."""


@dataclass(frozen=True)
class TokenStream:
    """Tokens [start, stop) of a corpus as a circle."""

    corpus: IndexedDataset
    start: int
    stop: int
    padding = 0.0

    def __len__(self) -> int:
        return self.stop - self.start

    def fingerprint(self) -> str:
        """An id of the corpus and the range in it."""
        return f"{self.corpus.fingerprint()}:{self.start}-{self.stop}"

    def cut(self, order: SampleOrder, slot: int, offset: int, count: int) -> Ranges:
        """`count` tokens and their last label, `offset` tokens into an epoch that reads slots of `slot` tokens in
        `order`, as ranges [start, stop) of the corpus.
        """
        first, stop, ranges = order.start(len(self)), offset + count, []
        while offset < stop:
            number, skipped = divmod(offset, slot)
            length = min(slot - skipped, stop - offset)
            offset += length
            label = offset == stop  # the last label is the token after the end
            ranges += self.pieces(first + order(number) * slot + skipped, length + label)
        return tuple(ranges)

    def pieces(self, position: int, count: int) -> list[tuple[int, int]]:
        """`count` tokens from `position` on, as ranges [start, stop) of the corpus: one, or more where it wraps."""
        ranges = []
        while count > 0:
            begin = self.start + position % len(self)
            end = min(self.stop, begin + count)
            ranges.append((begin, end))
            position, count = position + end - begin, count - (end - begin)
        return ranges


@dataclass(frozen=True)
class CorpusSample:
    """A sample put together of `ranges` [start, stop) of a corpus, its last label included, then padding.

    In a stream it is nearly always one range, and there is no padding.
    """

    corpus: IndexedDataset
    ranges: Ranges

    @property
    def length(self) -> int:
        """Its tokens, the last label included, without padding."""
        return sum(stop - start for start, stop in self.ranges)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the sample; nothing else is read."""
        parts = [self.corpus.tokens(*piece) for piece in self.pieces(start, stop)]
        missing = stop - start - sum(map(len, parts))
        if missing:
            parts.append(np.full(missing, PADDING, self.corpus.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.corpus.dtype), *parts])

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where those tokens lie in the corpus: ranges [start, stop)."""
        found, column = [], 0
        for first, last in self.ranges:
            begin, end = max(start - column, 0) + first, min(stop - column + first, last)
            if begin < end:
                found.append((begin, end))
            column += last - first
        return found

    def document_starts(self, length: int) -> np.ndarray:
        """The positions in [0, length) at which a document or the padding begins, or the text does not go on; int64,
        ascending.
        """
        starts, column = [np.zeros(1, np.int64)], 0
        for start, stop in self.pieces(0, length):
            starts += [np.array([column]), self.corpus.document_starts(start, stop) - start + column]
            column += stop - start
        if column < length:
            starts.append(np.array([column]))
        return np.unique(np.concatenate(starts))

    def place(self, position: int) -> str:
        [(token, _)] = self.pieces(position, position + 1)
        return f"document {self.corpus.document_at(token)} of {self.corpus.prefix}, token {token}"
