"""Megatron-LM's own order of samples (`--data-order megatron`), read-only: to go on with a run that started there.

Bit-equal to megatron-core's GPTDataset and BlendedDataset for the same seed, length, split and number of samples. It
is an index, built in memory at start: documents in a shuffled order, epoch after epoch, laid end to end; samples cut
from that; samples shuffled. It depends on how many samples are asked for, so nothing about the data can change in
mid-run: the order is there to finish what was begun, and `--data-order keyed` has none of these rules.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.token_stream import CorpusSample
from megasp.errors import DataError

SURPLUS = 0.005
"""Share of samples that megatron-core builds beyond what a blend takes of each dataset (mid_level_dataset_surplus)."""
FINAL_EPOCH = 0.80
"""A last epoch of which less than this share is needed is shuffled by itself, so that the ones before it are whole."""


class MegatronDataset:
    """Samples as megatron-core's GPTDataset gives them.

    Args:
        corpus: the indexed dataset.
        sequences: [start, stop) of its sequences, by `split_ranges`.
        seq_length: L.
        seed: --seed of that run.
        num_samples: how many samples it asked for; None for one epoch.

    Raises:
        DataError: the split holds fewer than L + 1 tokens, or a sample beyond the last is asked for.
    """

    def __init__(
        self, corpus: IndexedDataset, sequences: tuple[int, int], seq_length: int, seed: int, num_samples: int | None
    ) -> None:
        self.corpus, self.seq_length, self.name = corpus, seq_length, Path(corpus.prefix).name
        documents = np.arange(*sequences, dtype=np.int32)
        lengths = corpus.sequence_lengths[sequences[0] : sequences[1]].astype(np.int64)
        tokens = int(lengths.sum())
        if tokens < seq_length + 1:
            got = f"sequences {sequences[0]} to {sequences[1]} of {corpus.prefix} hold {tokens} tokens"
            raise DataError(got, f"Megatron-LM's order needs {seq_length + 1}", "give it a larger share of --split")
        wanted = 0 if num_samples is None else num_samples * seq_length + 1
        epochs = max(1, math.ceil(wanted / tokens))
        before_last = ((epochs - 1) * tokens - 1) // seq_length
        per_epoch = (tokens - 1) // seq_length
        apart = epochs > 1 and (num_samples or 0) - before_last < int(FINAL_EPOCH * per_epoch)
        random = np.random.RandomState(seed)
        runs = (epochs - 1, 1) if apart else (epochs,)
        self._documents = np.concatenate([_shuffled(np.tile(documents, run), random) for run in runs])
        ends = np.cumsum(lengths[self._documents - sequences[0]])
        self._starts = ends - lengths[self._documents - sequences[0]]
        total = (epochs * tokens - 1) // seq_length
        cuts = (0, before_last, total) if apart else (0, total)
        parts = [np.arange(a, b, dtype=np.uint32) for a, b in pairwise(cuts)]
        self._samples = np.concatenate([_shuffled(part, random) for part in parts])

    def __len__(self) -> int:
        return len(self._samples)

    def place(self, k: int) -> str:
        """Where sample k stands in the order, in words."""
        return f"sample {k} of {len(self)} in Megatron-LM's order"

    def locate(self, k: int) -> tuple["MegatronDataset", int]:
        """The dataset that sample k comes from, and its number there."""
        return self, k

    def sample(self, k: int) -> CorpusSample:
        """Sample k, for 0 <= k < len(self). Raises DataError where the corpus has changed since it was opened."""
        if not 0 <= k < len(self):
            rule = f"Megatron-LM's order of {self.name} ends after {len(self)}"
            raise DataError(f"sample {k}", rule, "use the --train-iters (or --train-samples) of the run that began")
        self.corpus.check_unchanged()
        position = int(self._samples[k]) * self.seq_length
        left, ranges = self.seq_length + 1, []
        i = int(np.searchsorted(self._starts, position, side="right")) - 1
        while left > 0:
            document = int(self._documents[i])
            first = self.corpus.sequence_token(document) + position - int(self._starts[i])
            stop = min(self.corpus.sequence_token(document) + int(self.corpus.sequence_lengths[document]), first + left)
            ranges.append((first, stop))
            position, left, i = position + stop - first, left - (stop - first), i + 1
        return CorpusSample(self.corpus, tuple(ranges))


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values


class MegatronBlend:
    """Samples as megatron-core's BlendedDataset gives them: each from the dataset that lags its weight most.

    Args:
        datasets: with enough samples each, see `sizes`.
        weights: of any sum.
        size: samples of the blend.
    """

    def __init__(self, datasets: Sequence[MegatronDataset], weights: Sequence[float], size: int) -> None:
        self.datasets, self.seq_length = tuple(datasets), datasets[0].seq_length
        self.name = "+".join(dataset.name for dataset in datasets)
        shares = np.array(weights) / np.sum(weights)
        self._dataset, self._number = np.empty(size, np.int16), np.empty(size, np.int64)
        counts = np.zeros(len(datasets))
        for k in range(size):
            lagging = int(np.argmax(shares * max(k, 1) - counts))
            self._dataset[k], self._number[k] = lagging, counts[lagging]
            counts[lagging] += 1

    def __len__(self) -> int:
        return len(self._dataset)

    def locate(self, k: int) -> tuple[MegatronDataset, int]:
        """The dataset that sample k comes from, and its number there."""
        if not 0 <= k < len(self):
            rule = f"Megatron-LM's order ends after {len(self)}"
            raise DataError(f"sample {k}", rule, "use the --train-iters (or --train-samples) of the run that began")
        return self.datasets[self._dataset[k]], int(self._number[k])

    def sample(self, k: int) -> CorpusSample:
        """Sample k, for 0 <= k < len(self)."""
        dataset, number = self.locate(k)
        return dataset.sample(number)


def blend(
    corpora: Sequence[tuple[IndexedDataset, tuple[int, int]]],
    weights: Sequence[float] | None,
    seq_length: int,
    seed: int,
    num_samples: int,
) -> MegatronDataset | MegatronBlend:
    """What megatron-core's builder makes of --data-path.

    Args:
        corpora: each with the sequences of its split.
        weights: None where --data-path names prefixes alone; these are then blended by their samples, one epoch.
        num_samples: of the run.
    """
    if weights is None and len(corpora) == 1:
        return MegatronDataset(*corpora[0], seq_length, seed, num_samples)
    if weights is None:
        datasets = [MegatronDataset(*corpus, seq_length, seed, None) for corpus in corpora]
        lengths = [len(dataset) for dataset in datasets]
        return MegatronBlend(datasets, lengths, min(num_samples, sum(lengths)))
    shares = np.array(weights) / np.sum(weights)
    targets = [math.ceil(num_samples * share) for share in shares.tolist()]
    datasets = [
        MegatronDataset(*corpus, seq_length, seed, math.ceil(target * (1 + SURPLUS)))
        for corpus, target in zip(corpora, targets, strict=True)
    ]
    return MegatronBlend(datasets, shares.tolist(), sum(targets))
