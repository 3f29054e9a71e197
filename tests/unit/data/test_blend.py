"""Exactness of blends, and what --data-path may say."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.data import BlendedDataset, BlendOrder, GPTDataset
from megasp.data.blend import parse_data_path, unique_names
from megasp.errors import DataError

weights = st.lists(st.fractions(Fraction(1, 10**6), 10**6).filter(bool), min_size=1, max_size=12)


@given(weights)
def test_every_counter_rises_by_one_and_counts_are_a_closed_form(w):
    order = BlendOrder(w, [str(d) for d in range(len(w))])
    seen = [0] * len(w)
    for k in range(150):
        assert order.counts(k) == seen
        dataset, number = order(k)
        assert number == seen[dataset]  # no repeat, no gap
        seen[dataset] += 1
        for count, weight in zip(seen, w, strict=True):
            assert abs(count - (k + 1) * weight / sum(w)) < 2


@given(weights, st.integers(0, 10**12))
def test_far_out_it_is_as_exact(w, k):
    order = BlendOrder(w, [str(d) for d in range(len(w))])
    before, after = order.counts(k), order.counts(k + 1)
    dataset, number = order(k)
    assert before[dataset] == number and after[dataset] == number + 1 and sum(after) == k + 1
    assert all(abs(count - k * weight / sum(w)) < 2 for count, weight in zip(before, w, strict=True))


@given(weights, st.randoms())
def test_the_order_of_listing_does_not_matter(w, random):
    names = [f"n{d}" for d in range(len(w))]
    pairs = list(zip(w, names, strict=True))
    shuffled = random.sample(pairs, len(pairs))
    one, two = BlendOrder(*zip(*pairs, strict=True)), BlendOrder(*zip(*shuffled, strict=True))
    for k in range(60):
        assert names[one(k)[0]] == shuffled[two(k)[0]][1]


def test_extreme_weights():
    order = BlendOrder([Fraction(10**15), Fraction(1)], ["a", "b"])
    assert order.counts(10**15 + 1) == [10**15, 1]


def test_order_is_frozen():
    """Checkpoints rely on it: a change of these numbers reorders every blend in progress."""
    order = BlendOrder([Fraction(5), Fraction(3), Fraction(2)], ["web", "books", "code"])
    assert [order(k)[0] for k in range(12)] == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1]


def test_samples_come_from_the_datasets(corpus):
    parts = [GPTDataset(corpus([100 * (i + 1)], f"c{i}"), (0, 1), 10, seed=0) for i in range(2)]
    blend = BlendedDataset(parts, [Fraction(1), Fraction(2)], first_sample=50)
    assert blend.name == "c0+c1"
    for k in range(50, 80):
        part, number = blend.locate(k)
        np.testing.assert_array_equal(blend.sample(k).tokens(0, 11), part.sample(number).tokens(0, 11))
    assert blend.epochs(50, 30)[1] == "c1: 20 of 30 samples to come, 20 an epoch, 1.00 epochs"


@given(st.lists(st.tuples(st.decimals("0.001", "1e6", places=3), st.sampled_from("abcdefgh")), min_size=1, max_size=6,
                unique_by=lambda pair: pair[1]))  # fmt: skip
def test_weights_are_read_exactly(pairs):
    entries = [str(item) for pair in pairs for item in pair]
    assert parse_data_path(entries) == [(Fraction(weight), prefix) for weight, prefix in pairs]


@pytest.mark.parametrize("entries", [("a",), ("a", "b/1.5"), ("1/2", "b"), ("inf", "nan"), ("7",)])
def test_prefixes_alone(entries):
    assert parse_data_path(entries) == [(None, entry) for entry in entries]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("0.7", "a", "b"), "mixes weights and prefixes: entry 3, b, is a prefix"),
        (("a", "0.3", "b"), "mixes weights and prefixes: entry 1, a, is a prefix"),
        (("1", "2", "a", "b"), "entry 2, 2, is a number.*./NAME"),
        (("0.7", "a", "0.3"), "ends with the weight 0.3"),
        (("0", "a", "1", "b"), "gives a the weight 0"),
        (("-1", "a", "1", "b"), "gives a the weight -1"),
        (("1", "x/a", "1", "x/a"), "names x/a 2 times: .*add up"),
        (("x/a", "./x/a"), "names x/a 2 times"),
    ],
)
def test_bad_blends_are_refused(entries, message):
    with pytest.raises(DataError, match=message):
        parse_data_path(entries)


def test_names_are_unique_and_stable():
    assert unique_names(["x/a", "y/a", "b", "z/a"]) == ["a", "a#2", "b", "a#3"]
