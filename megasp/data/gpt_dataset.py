"""Samples of a corpus: which tokens sample k reads is a pure function, and nothing is built to answer it.

The N tokens of a split form a circle. Epoch e cuts it, from a keyed start, into n = N // L slots of L tokens (fewer
than L tokens stay unread, others in each epoch), and reads the slots in a keyed order:

    sample k  ->  epoch k // n  ->  slot order(k % n)  ->  tokens [start + slot * L, ... + L + 1) of the circle

The one token more is the last label; it is the next slot's first input. Documents are read in file order: only
samples are shuffled. With --document-packing best-fit the slots are samples packed of whole documents (`packing.py`).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.packing import BestFit
from megasp.data.sample_order import SampleOrder
from megasp.data.token_stream import CorpusSample, TokenStream
from megasp.errors import DataError


class Sample(Protocol):
    """seq_length + 1 tokens, of which any range can be read by itself; beyond the first `length` they are padding."""

    @property
    def length(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the sample, any integer dtype."""
        ...

    def place(self, position: int) -> str:
        """Where the token at `position` comes from, in words."""
        ...

    def document_starts(self, length: int) -> np.ndarray:
        """The positions in [0, length) at which documents begin, int64, ascending; the first is 0."""
        ...


class Dataset(Protocol):
    """An endless, reproducible sequence of samples."""

    name: str
    seq_length: int

    def sample(self, k: int) -> Sample:
        """Sample k, for any k >= 0."""
        ...


def split_ranges(split: str, num_sequences: int) -> tuple[tuple[int, int], ...]:
    """The sequences [start, stop) of training, validation and test, by Megatron-LM's rule: `split` ("969,30,1") gives
    their shares, bounds are rounded half to even.

    Raises:
        DataError: `split` is not one to three numbers, none negative, with a positive sum.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        rule = "it must be one to three shares, none negative, separated by commas"
        raise DataError(f"--split is {split!r}", rule, "use 969,30,1")
    weights = np.array([*shares, 0.0, 0.0][:3])
    ends = [0.0]
    for weight in weights / weights.sum():  # Megatron-LM's order of operations, to the last bit
        ends.append(ends[-1] + weight)
    bounds = [min(num_sequences, round(float(end) * num_sequences)) for end in ends]
    return tuple(pairwise(bounds))


@dataclass(frozen=True)
class Position:
    """How far a dataset has been read: `offset` tokens into `epoch`, which is cut into slots of `slot` tokens."""

    epoch: int
    slot: int
    offset: int

    def advance(self, samples: int, seq_length: int, tokens: int) -> "Position":
        """The position after `samples` more samples of `seq_length`, in a dataset of `tokens` tokens.

        They first finish the epoch under way as it was cut, then read epochs cut into slots of `seq_length`.
        """
        finishing = self.finishing(seq_length, tokens)
        if samples < finishing:
            return Position(self.epoch, self.slot, self.offset + samples * seq_length)
        epoch, i = divmod(samples - finishing, tokens // seq_length)
        return Position(self.epoch + (self.offset > 0) + epoch, seq_length, i * seq_length)

    def finishing(self, seq_length: int, tokens: int) -> int:
        """Samples of `seq_length` that finish the epoch under way; 0 where none of it is read: it is then cut anew."""
        return (tokens // self.slot * self.slot - self.offset) // seq_length if self.offset else 0


class GPTDataset:
    """The samples of one split of a corpus.

        corpus = IndexedDataset("data/code_text_document")
        training, validation, test = split_ranges("969,30,1", len(corpus))
        dataset = GPTDataset(corpus, training, seq_length=2048, seed=1234)
        dataset.sample(k).tokens(0, 2049)

    Args:
        corpus: the indexed dataset.
        sequences: [start, stop) of its sequences (as Megatron-LM splits; `preprocess` makes one of each document).
        seq_length: L.
        seed: of the order.
        name: keys the order; the corpus's file name by default, so it does not depend on where the file lies.
        start: where an earlier phase of the run stopped reading. Samples first finish its epoch, slot by slot in that
            epoch's order and cutting, so that no token comes twice and fewer than L are left over; then epochs of L
            follow. A sample longer than that epoch's slots is put together of several.
        packing: "stream", or "best-fit" (one pass over the index of the split; an epoch must have been packed for L).

    Attributes:
        samples_per_epoch: n.
        tokens: of the split; with best-fit packing those of its samples, padding included.

    Raises:
        DataError: the split holds fewer than L tokens (best-fit: none), or what is no token ids.
    """

    def __init__(
        self,
        corpus: IndexedDataset,
        sequences: tuple[int, int],
        seq_length: int,
        seed: int,
        name: str | None = None,
        start: Position | None = None,
        packing: str = "stream",
    ) -> None:
        self.corpus, self.seq_length, self.seed = corpus, seq_length, seed
        self.name = dataset_name(corpus.prefix) if name is None else name
        if corpus.dtype.kind not in "iu":
            rule = "token ids are integers"
            raise DataError(f"{corpus.prefix} holds {corpus.dtype}", rule, "name a dataset that `preprocess` made")
        first, stop = map(corpus.sequence_token, sequences)
        if stop - first < (1 if packing == "best-fit" else seq_length):
            got = f"sequences {sequences[0]} to {sequences[1]} of {corpus.prefix} hold {stop - first} tokens"
            rule = f"a split must fill one sample of --seq-length {seq_length}"
            smaller = f", or use --seq-length {stop - first} or less" if stop > first else ""
            raise DataError(got, rule, "give it a larger share of --split" + smaller)
        self.stream = (
            BestFit(corpus, first, stop, seq_length) if packing == "best-fit" else TokenStream(corpus, first, stop)
        )
        self.tokens = len(self.stream)
        self.samples_per_epoch = self.tokens // seq_length
        self.start = start or Position(0, seq_length, 0)
        self.order = lru_cache(maxsize=8)(self._order)

    def _order(self, epoch: int, slot: int) -> SampleOrder:
        return SampleOrder(self.tokens // slot, self.seed, self.name, epoch)

    def position(self, k: int) -> Position:
        """How far the dataset has been read before sample k."""
        return self.start.advance(k, self.seq_length, self.tokens)

    def sample(self, k: int) -> CorpusSample:
        """Sample k, for any k >= 0.

        Raises:
            DataError: the corpus has changed since it was opened.
        """
        self.corpus.check_unchanged()
        position = self.position(k)
        order = self.order(position.epoch, position.slot)
        return CorpusSample(self.corpus, self.stream.cut(order, position.slot, position.offset, self.seq_length))

    def place(self, k: int) -> str:
        """Where sample k stands in the order, in words."""
        return f"epoch {self.position(k).epoch}"

    def locate(self, k: int) -> tuple["GPTDataset", int]:
        """The dataset that sample k comes from, and its number there."""
        return self, k

    def fingerprint(self) -> str:
        """An id of the corpus, the split's range in it, and how it is packed."""
        return self.stream.fingerprint()


def dataset_name(prefix: str) -> str:
    """The name that keys a corpus's order: its file name."""
    return Path(prefix).name


class MockDataset:
    """Synthetic samples that a model can learn: each counts up, modulo the vocabulary, from a start and by a step
    (1 to 8) of its own.
    """

    name = "mock"

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def sample(self, k: int) -> "MockSample":
        """Sample k, for any k >= 0."""
        key = hashlib.blake2b(f"{self.seed},{k}".encode(), digest_size=16).digest()
        first, step = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        return MockSample(first % self.vocab_size, 1 + step % 8, self.vocab_size, self.seq_length + 1)


@dataclass(frozen=True)
class MockSample:
    """Tokens first, first + step, first + 2 step, ... modulo vocab_size."""

    first: int
    step: int
    vocab_size: int
    length: int

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return (self.first + self.step * np.arange(start, stop)) % self.vocab_size

    def document_starts(self, length: int) -> np.ndarray:
        """A document of one token, and others up to the power of two above `first`."""
        longest = 2 << (self.first % 7)
        return np.unique(np.array([0, 1, *range(1 + self.step, length, longest + self.step)]).clip(max=length - 1))

    def place(self, position: int) -> str:
        return f"position {position} of a mock sample"
