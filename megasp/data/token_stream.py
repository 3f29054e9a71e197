"""A range of a corpus as a circle of tokens, and samples that are cut from it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class TokenStream:
    """Tokens [start, stop) of a corpus as a circle."""

    corpus: IndexedDataset
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def pieces(self, position: int, count: int) -> list[tuple[int, int]]:
        """`count` tokens from `position` on, as ranges [start, stop) of the corpus: one, or more where it wraps."""
        ranges = []
        while count > 0:
            begin = self.start + position % len(self)
            end = min(self.stop, begin + count)
            ranges.append((begin, end))
            position, count = position + end - begin, count - (end - begin)
        return ranges

    def tokens(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from `position` on; a view of the file unless it wraps."""
        parts = [self.corpus.tokens(*piece) for piece in self.pieces(position, count)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.corpus.dtype), *parts])


@dataclass(frozen=True)
class StreamSample:
    """A sample made of `runs` of a stream, (position, tokens) each; nearly always one run."""

    stream: TokenStream
    runs: tuple[tuple[int, int], ...]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the sample; nothing else is read."""
        parts = [self.stream.tokens(*run) for run in self._cut(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.stream.corpus.dtype), *parts])

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where those tokens lie in the corpus: ranges [start, stop)."""
        return [piece for run in self._cut(start, stop) for piece in self.stream.pieces(*run)]

    def document_starts(self, length: int) -> np.ndarray:
        """The positions in [0, length) at which a document begins, or at which the text does not go on from the
        position before; 0 always does. int64, ascending."""
        return starts_of_pieces(self.stream.corpus, self.pieces(0, length))

    def place(self, position: int) -> str:
        [(token, _)] = self.pieces(position, position + 1)
        return f"document {self.stream.corpus.document_at(token)} of {self.stream.corpus.prefix}, token {token}"

    def _cut(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of the runs that positions [start, stop) are."""
        first = 0
        for position, count in self.runs:
            begin, end = max(start, first), min(stop, first + count)
            if begin < end:
                yield position + begin - first, end - begin
            first += count


def starts_of_pieces(corpus: IndexedDataset, pieces: list[tuple[int, int]]) -> np.ndarray:
    """The positions, in ranges of a corpus laid one after the other, at which a range or a document begins."""
    starts, column = [np.zeros(1, np.int64)], 0
    for start, stop in pieces:
        starts += [np.array([column]), corpus.document_starts(start, stop) - start + column]
        column += stop - start
    return np.unique(np.concatenate(starts))
