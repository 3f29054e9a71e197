"""Blends: sample k of a weighted mixture -> (dataset, its own counter), exactly, in O(log datasets), nothing built.

A binary tree of two-way rounded splits. A node gives its left side a share a / w, so after k samples of the node the
left side has had round(k * a / w) of them and the right side the rest:

    0.5 web ─┐           node of weight 0.5 + 0.3 + 0.2: left {web} 1/2, right {books, code} 1/2
    0.3 books┼─>  k           sample 7: round(7/2) = 4 of the left before it, round(8/2) = 4 after it -> the right's 3rd
    0.2 code ┘                node {books, code}: round(3 * 3/5) = 2 before, round(4 * 3/5) = 2 after -> code's 1st

Each dataset's counter rises by exactly one at a time, so no sample is skipped or repeated, and each count stays within
(depth of the tree) / 2 samples of its share for ever. (Rounding cumulative weights is not monotone: counts fall back.)
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from megasp.data.gpt_dataset import GPTDataset, dataset_name
from megasp.data.token_stream import CorpusSample
from megasp.errors import DataError

_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


class _Node(NamedTuple):
    """Two sides; `share` of every `whole` samples go left."""

    share: int
    whole: int
    left: "_Node | int"
    right: "_Node | int"


class BlendOrder:
    """Which dataset each sample of a blend comes from.

        order = BlendOrder([Fraction(7, 10), Fraction(3, 10)], ["web", "books"])
        order(12)          # (0, 8): sample 12 is sample 8 of web
        order.counts(12)   # [8, 4]: how many of each the first 12 samples hold

    Args:
        weights: positive; only their ratios matter.
        names: break ties between equal weights, so that the order in which datasets are listed does not matter.
    """

    def __init__(self, weights: Sequence[Fraction], names: Sequence[str]) -> None:
        assert weights and all(weight > 0 for weight in weights), weights
        by_weight = sorted(range(len(weights)), key=lambda d: (-weights[d], names[d], d))
        self._root = _tree(by_weight, weights)
        self._size = len(weights)

    def __call__(self, k: int) -> tuple[int, int]:
        """The dataset of sample k, and how many of its samples come before."""
        node = self._root
        while not isinstance(node, int):
            before, after = (_rounded(t * node.share, node.whole) for t in (k, k + 1))
            k, node = (before, node.left) if after > before else (k - before, node.right)
        return node, k

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each dataset."""
        counts = [0] * self._size
        todo = [(self._root, samples)]
        while todo:
            node, k = todo.pop()
            if isinstance(node, int):
                counts[node] = k
            else:
                left = _rounded(k * node.share, node.whole)
                todo += [(node.left, left), (node.right, k - left)]
        return counts


def _rounded(numerator: int, denominator: int) -> int:
    """The nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _tree(datasets: Sequence[int], weights: Sequence[Fraction]) -> _Node | int:
    """Halves of nearly equal weight, so that a dataset of much weight lies near the root."""
    if len(datasets) == 1:
        return datasets[0]
    sides: tuple[list[int], list[int]] = [], []
    sums = [Fraction(0), Fraction(0)]
    for d in datasets:
        lighter = 0 if sums[0] <= sums[1] else 1
        sides[lighter].append(d)
        sums[lighter] += weights[d]
    share = sums[0] / (sums[0] + sums[1])
    return _Node(share.numerator, share.denominator, _tree(sides[0], weights), _tree(sides[1], weights))


class BlendedDataset:
    """A weighted mixture of datasets.

    Args:
        datasets: of one seq_length.
        weights: of samples; only their ratios matter.
        first_sample: the number of its first sample, where a run's numbering goes on from an earlier phase.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[Fraction], first_sample: int = 0) -> None:
        assert len({dataset.seq_length for dataset in datasets}) == 1, [d.seq_length for d in datasets]
        self.datasets, self.weights, self.first_sample = tuple(datasets), tuple(weights), first_sample
        self.seq_length = datasets[0].seq_length
        self.name = "+".join(dataset.name for dataset in datasets)
        self.order = BlendOrder(weights, [dataset.name for dataset in datasets])

    def locate(self, k: int) -> tuple[GPTDataset, int]:
        """The dataset that sample k comes from, and its number there."""
        dataset, number = self.order(k - self.first_sample)
        return self.datasets[dataset], number

    def sample(self, k: int) -> CorpusSample:
        """Sample k, for any k >= first_sample."""
        dataset, number = self.locate(k)
        return dataset.sample(number)

    def epochs(self, consumed: int, samples: int) -> list[str]:
        """How much of each dataset `samples` samples after `consumed` ones read, in words."""
        counts = zip(*(self.order.counts(k - self.first_sample) for k in (consumed, consumed + samples)), strict=True)
        return [
            f"{dataset.name}: {stop - start:,} of {samples:,} samples to come, {dataset.samples_per_epoch:,} an epoch, "
            f"{(stop - start) / dataset.samples_per_epoch:.2f} epochs"
            + (f", {dataset.stream.padding:.2%} of them padding" if dataset.stream.padding else "")
            for dataset, (start, stop) in zip(self.datasets, counts, strict=True)
        ]


def parse_data_path(entries: Sequence[str], flag: str = "--data-path") -> list[tuple[Fraction | None, str]]:
    """(weight, prefix) of each dataset, from prefixes alone (weight None) or from weight prefix weight prefix ...

    Raises:
        DataError: weights and prefixes are mixed, a weight is not positive, or a prefix comes twice.
    """
    numbers = [_number(entry) for entry in entries]
    weighted = len(entries) > 1 and any(number is not None for number in numbers)
    if not weighted:
        pairs: list[tuple[Fraction | None, str]] = [(None, prefix) for prefix in entries]
    else:
        pairs = [(numbers[i], entries[i + 1]) for i in range(0, len(entries) - 1, 2)]
        rule = "give prefixes alone, or a weight before each of them: WEIGHT PREFIX WEIGHT PREFIX ..."
        for i, number in enumerate(numbers):
            if (number is None) == (i % 2 == 0):
                found = "a prefix" if number is None else "a number"
                raise DataError(f"{flag} mixes weights and prefixes: entry {i + 1}, {entries[i]}, is {found}", rule,
                                "a file whose name is a number is written ./NAME")  # fmt: skip
        if len(entries) % 2:
            raise DataError(f"{flag} ends with the weight {entries[-1]}", rule, "add its prefix, or leave it out")
    for weight, prefix in pairs:
        if weight is not None and weight <= 0:
            rule = "a weight is the share of the samples and must be above 0"
            raise DataError(f"{flag} gives {prefix} the weight {weight}", rule, f"leave {prefix} out")
    prefixes = [str(Path(prefix)) for _, prefix in pairs]
    twice = [prefix for prefix in prefixes if prefixes.count(prefix) > 1]
    if twice:
        rule = "a dataset stands in a blend once"
        raise DataError(f"{flag} names {twice[0]} {prefixes.count(twice[0])} times", rule, "add up its weights")
    return pairs


def _number(entry: str) -> Fraction | None:
    """The number that a decimal entry is, exactly; "1/2" is a path."""
    return Fraction(entry) if _DECIMAL.fullmatch(entry) else None


def unique_names(prefixes: Sequence[str]) -> list[str]:
    """A name for each corpus: its file name, and "#2", "#3" ... behind it where an earlier one has it."""
    names: list[str] = []
    for prefix in prefixes:
        base = dataset_name(prefix)
        count = sum(name.split("#")[0] == base for name in names)
        names.append(base if count == 0 else f"{base}#{count + 1}")
    return names
