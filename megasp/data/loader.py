"""Batches of one rank: its samples of each step, of these its shard of the sequence, read ahead in the background.

With M microbatches of B samples on each of DP data-parallel ranks, a step takes M x DP x B consecutive samples:

    sample of row b, microbatch m, rank r  =  consumed + (m * DP + r) * B + b

so the global batch does not depend on DP, and the number of samples consumed is all that a checkpoint must store.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from megasp.data.gpt_dataset import Dataset, Sample
from megasp.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One microbatch on one rank: B samples, S positions of each.

    Attributes:
        tokens: inputs, int64 [B, S].
        labels: the token after each input, int64 [B, S].
        loss_mask: 1 where the label counts, else 0, float32 [B, S].
        positions: where in the sample each input lies, int64 [S].
        samples: number of each sample, int64 [B].
        document_starts: of each whole sample, where its documents begin, int64, ascending from 0; None where documents
            are not told apart.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    samples: np.ndarray
    document_starts: tuple[np.ndarray, ...] | None = None


class Loader:
    """An endless iterator of steps, each a list of microbatches.

        with Loader(dataset, shard_map.ranges[cp_rank], micro_batch_size=2, global_batch_size=64, ...) as loader:
            for step in range(train_iters):
                for batch in loader.step():
                    ...

    Args:
        dataset: where the samples come from.
        ranges: the positions [start, stop) of each sample that this rank holds (`ShardMap.ranges[rank]`).
        micro_batch_size: B, samples of a microbatch on this rank.
        global_batch_size: samples of a step over all ranks; a multiple of B x dp_size.
        dp_rank, dp_size: this rank among those that read different samples.
        vocab_size: bound of token ids (the padded one, if it is padded).
        reset_attention_mask: whether batches tell documents apart.
        eod: the end-of-document id, to leave inputs that equal it out of the loss (--eod-mask-loss).
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
        ranges: Sequence[tuple[int, int]],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        reset_attention_mask: bool = False,
        eod: int | None = None,
        first_sample: int = 0,
        prefetch: int = 2,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, (global_batch_size, micro_batch_size, dp_size)
        self.dataset, self.ranges, self.vocab_size, self.eod = dataset, tuple(ranges), vocab_size, eod
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.reset_attention_mask = reset_attention_mask
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
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
                first = self.consumed_samples + len(self._ahead) * self.global_batch_size
                self._ahead.append(self._reader.submit(self.read, first))
            batches = self._ahead[0].result()
            self._ahead.popleft()
        self.consumed_samples += self.global_batch_size
        return batches

    def read(self, first_sample: int) -> list[Batch]:
        """This rank's microbatches of the step that begins at `first_sample`: a pure function."""
        stride = self.micro_batch_size * self.dp_size
        starts = range(first_sample, first_sample + self.global_batch_size, stride)
        return [self._microbatch(start + self.dp_rank * self.micro_batch_size) for start in starts]

    def _microbatch(self, first_sample: int) -> Batch:
        samples = np.arange(first_sample, first_sample + self.micro_batch_size)
        tokens, labels = (np.empty((len(samples), len(self.positions)), np.int64) for _ in range(2))
        for row, k in enumerate(samples.tolist()):
            sample, column = self.dataset.sample(k), 0
            for start, stop in self.ranges:
                ids = self._checked(sample, start, stop + 1)  # the last label lies one past the shard
                columns = slice(column, column + stop - start)
                tokens[row, columns], labels[row, columns] = ids[:-1], ids[1:]
                column += stop - start
        mask = np.ones(tokens.shape, np.float32) if self.eod is None else (tokens != self.eod).astype(np.float32)
        starts = None
        if self.reset_attention_mask:
            length = self.dataset.seq_length
            starts = tuple(self.dataset.sample(k).document_starts(length) for k in samples.tolist())
        return Batch(tokens, labels, mask, self.positions, samples, starts)

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
