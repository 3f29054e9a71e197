"""Batches of one rank: its samples of each step, of these its shard of the sequence, read ahead in the background.

With M microbatches of B samples on each of DP data-parallel ranks, a step takes M x DP x B consecutive samples:

    sample of row b, microbatch m, rank r  =  consumed + (m * DP + r) * B + b

so the global batch does not depend on DP, and the number of samples consumed is all that a checkpoint must store.
A batch knows where its documents begin:

    sample           the  cat  sat  <eod>  a    dog  ran  <eod>  it
    document_starts   0                    4                     8         (of the whole sample, on every rank)
    positions         0    1    2    3     4    5    6    7      8
    position_ids      0    1    2    3     0    1    2    3      0         (--reset-position-ids)
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from megasp.config.batch_schedule import BatchSchedule
from megasp.data.gpt_dataset import Dataset, Sample
from megasp.errors import DataError

Starts = tuple[np.ndarray, ...]
"""For each row the positions at which a document begins, int64, ascending, 0 always among them."""

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of positions, in the order in which they are held."""


@dataclass(frozen=True)
class Batch:
    """One microbatch on one rank: B samples, S positions of each.

    Attributes:
        tokens: inputs, int64 [B, S].
        labels: the token after each input, int64 [B, S].
        loss_mask: 1 where the label counts, else 0, float32 [B, S].
        positions: where in the sample each input lies, int64 [S].
        samples: number of each sample, int64 [B].
        position_ids: the positions that the model sees, int64 [B, S], where they restart with each document; else
            None, and they are `positions`.
        document_starts: where documents begin in each whole sample (not in this rank's shard); None where attention is
            not restricted to documents.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    samples: np.ndarray
    position_ids: np.ndarray | None = None
    document_starts: Starts | None = None


@dataclass(frozen=True)
class DocumentRules:
    """What the boundaries of documents change.

    Attributes:
        eod: the end-of-document id; needed by `mask_loss` and `split_at_eod`.
        mask_loss: no loss where the input is `eod` (--eod-mask-loss).
        reset_positions: `Batch.position_ids` restart with each document (--reset-position-ids).
        reset_attention: `Batch.document_starts` are given (--reset-attention-mask).
        split_at_eod: a document begins after each `eod`, too, as in Megatron-LM, which knows no other boundaries;
            every rank then reads whole samples (--eod-starts-document).
    """

    eod: int | None = None
    mask_loss: bool = False
    reset_positions: bool = False
    reset_attention: bool = False
    split_at_eod: bool = False


class Loader:
    """An endless iterator of steps, each a list of microbatches.

        with Loader(dataset, lambda documents: shards.of(documents).ranges[cp_rank], micro_batch_size=2, ...) as loader:
            for step in range(train_iters):
                for batch in loader.step():
                    ...

    Args:
        dataset: where the samples come from.
        ranges: the positions of each sample that this rank holds, of a microbatch whose `document_starts` these are.
        micro_batch_size: B, samples of a microbatch on this rank.
        batch: samples of each step over all ranks; multiples of B x dp_size.
        dp_rank, dp_size: this rank among those that read different samples.
        vocab_size: bound of token ids (the padded one, if it is padded).
        documents: what document boundaries change; nothing without it.
        first_sample: samples consumed before.
        prefetch: steps to read ahead in a thread; 0 reads when asked.

    Attributes:
        consumed_samples: samples of the steps handed out so far and before; the position to store.

    Raises (by `step`):
        DataError: a token id beyond the vocabulary.
    """

    def __init__(
        self,
        dataset: Dataset,
        ranges: Callable[[Starts | None], Ranges],
        *,
        micro_batch_size: int,
        batch: BatchSchedule,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        documents: DocumentRules = DocumentRules(),
        first_sample: int = 0,
        prefetch: int = 2,
    ) -> None:
        per_pass = micro_batch_size * dp_size
        assert all(size % per_pass == 0 for size in batch.sizes()), (batch, micro_batch_size, dp_size)
        self.dataset, self.ranges, self.vocab_size, self.documents = dataset, ranges, vocab_size, documents
        self.micro_batch_size, self.batch = micro_batch_size, batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.consumed_samples = first_sample
        self.prefetch = prefetch
        self._reader = ThreadPoolExecutor(1, "megasp-loader")
        self._ahead: deque[Future[list[Batch]]] = deque()  # reads of the next steps, in order

    def step(self) -> list[Batch]:
        """This rank's microbatches of the next step. An error of the background thread is raised here."""
        if self.prefetch == 0:
            batches = self.read(self.consumed_samples)
        else:
            while len(self._ahead) <= self.prefetch:
                first = self.batch.advance(self.consumed_samples, len(self._ahead))
                self._ahead.append(self._reader.submit(self.read, first))
            batches = self._ahead[0].result()
            self._ahead.popleft()
        self.consumed_samples = self.batch.advance(self.consumed_samples, 1)
        return batches

    def read(self, first_sample: int) -> list[Batch]:
        """This rank's microbatches of the step that begins at `first_sample`: a pure function."""
        stride = self.micro_batch_size * self.dp_size
        starts = range(first_sample, first_sample + self.batch.at(first_sample), stride)
        return [self._microbatch(start + self.dp_rank * self.micro_batch_size) for start in starts]

    def _microbatch(self, first_sample: int) -> Batch:
        numbers = np.arange(first_sample, first_sample + self.micro_batch_size)
        samples, rules = [self.dataset.sample(k) for k in numbers.tolist()], self.documents
        starts = position_ids = None
        if rules.reset_positions or rules.reset_attention:
            starts = tuple(map(self._document_starts, samples))
        seen = starts if rules.reset_attention else None
        ranges = self.ranges(seen)
        positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        if rules.reset_positions and starts is not None:
            position_ids = np.stack([_position_ids(positions, row) for row in starts])
        tokens, labels = (np.empty((len(numbers), len(positions)), np.int64) for _ in range(2))
        for row, sample in enumerate(samples):
            column = 0
            for start, stop in ranges:
                ids = self._checked(sample, start, stop + 1)  # the last label lies one past the shard
                columns = slice(column, column + stop - start)
                tokens[row, columns], labels[row, columns] = ids[:-1], ids[1:]
                column += stop - start
        ends = np.array([sample.length for sample in samples])
        mask = positions < ends[:, None] - 1  # padding, and what comes before it, has no label
        if rules.mask_loss:
            mask &= tokens != rules.eod
        return Batch(tokens, labels, mask.astype(np.float32), positions, numbers, position_ids, seen)

    def _document_starts(self, sample: Sample) -> np.ndarray:
        length = self.dataset.seq_length
        starts = sample.document_starts(length)
        if not self.documents.split_at_eod:
            return starts
        after_eod = np.flatnonzero(sample.tokens(0, length) == self.documents.eod) + 1
        return np.union1d(starts, after_eod[after_eod < length])

    def _checked(self, sample: Sample, start: int, stop: int) -> np.ndarray:
        """The sample's tokens [start, stop), all of them in the vocabulary."""
        ids = sample.tokens(start, stop)
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(outside):
            token = int(ids[outside[0]])
            got = f"token id {token} in {sample.place(start + int(outside[0]))}"
            rule = f"dataset {self.dataset.name} must keep to the vocabulary of {self.vocab_size}"
            fix = f"use the tokenizer that made the dataset, or --vocab-size {token + 1} or more"
            raise DataError(got, rule, fix)
        return ids

    def close(self) -> None:
        """Stop reading ahead; harmless if repeated."""
        self._reader.shutdown(cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        return self.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _position_ids(positions: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The place of each position in its document."""
    return positions - starts[np.searchsorted(starts, positions, side="right") - 1]
