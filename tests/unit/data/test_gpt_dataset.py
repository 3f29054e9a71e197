import numpy as np
import pytest

from megasp.data import GPTDataset, IndexedDataset, MockDataset, TokenStream, split_ranges
from megasp.errors import DataError


@pytest.mark.parametrize(("lengths", "seq_length"), [([50], 50), ([7, 0, 30, 13], 8), ([100, 3], 1), ([5] * 41, 16)])
def test_each_epoch_tiles_the_circle(corpus, lengths, seq_length):
    data = corpus(lengths)
    dataset = GPTDataset(data, (0, len(data)), seq_length, seed=3)
    tokens, n = sum(lengths), dataset.samples_per_epoch
    assert n == tokens // seq_length
    starts = set()
    for epoch in range(4):
        samples = [dataset.sample(epoch * n + i) for i in range(n)]
        read = np.concatenate([sample.tokens(0, seq_length) for sample in samples])
        assert len(np.unique(read)) == n * seq_length > tokens - seq_length  # no overlap, fewer than L unread
        for sample in samples:
            whole = sample.tokens(0, seq_length + 1)
            np.testing.assert_array_equal(whole, (whole[0] + np.arange(seq_length + 1)) % tokens)
        starts.add(int(samples[0].tokens(0, 1)[0]))
    assert len(starts) > 1


def test_splits_do_not_share_tokens(corpus):
    data = corpus([10] * 100)
    seen = []
    for part in split_ranges("8,1,1", len(data)):
        dataset = GPTDataset(data, part, 25, seed=0)
        seen.append({int(t) for k in range(3 * dataset.samples_per_epoch) for t in dataset.sample(k).tokens(0, 26)})
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
    assert max(seen[0]) < 800 and max(seen[1]) < 900 <= min(seen[2])


def test_any_range_of_a_sample_reads_only_itself(corpus, monkeypatch):
    dataset = GPTDataset(corpus([40, 60]), (0, 2), 30, seed=0)
    wholes = [dataset.sample(k).tokens(0, 31) for k in range(9)]
    asked = []
    read = IndexedDataset.tokens
    monkeypatch.setattr(IndexedDataset, "tokens", lambda self, a, b: asked.append(b - a) or read(self, a, b))
    for k, whole in enumerate(wholes):
        for start, stop in [(0, 1), (7, 16), (30, 31), (4, 4)]:
            asked.clear()
            np.testing.assert_array_equal(dataset.sample(k).tokens(start, stop), whole[start:stop])
            assert sum(asked) == stop - start


def test_order_depends_on_name_and_seed_but_not_on_place(corpus, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    data, other, moved = corpus([500]), corpus([500], "other"), corpus([500], "elsewhere/corpus")

    def order(data, seed=1, **name):
        dataset = GPTDataset(data, (0, 1), 5, seed, **name)
        return [int(dataset.sample(k).tokens(0, 1)[0]) for k in range(100)]

    assert order(data) == order(moved) == order(other, name="corpus")
    assert order(data) != order(other) and order(data) != order(data, seed=2)


def test_fingerprint_tells_splits_apart(corpus):
    data = corpus([10] * 10)
    prints = {GPTDataset(data, part, 5, 0).fingerprint() for part in [(0, 10), (0, 9), (1, 10)]}
    assert len(prints) == 3


def test_split_that_is_too_small_is_refused(corpus):
    data = corpus([10, 4])
    with pytest.raises(DataError) as error:
        GPTDataset(data, (1, 2), 5, 0)
    assert "hold 4 tokens" in error.value.got and "5" in error.value.rule and "--seq-length 4" in error.value.fix
    with pytest.raises(DataError, match="hold 0 tokens"):
        GPTDataset(data, (2, 2), 5, 0)


@pytest.mark.parametrize("split", ["969,30,1", "1", "98,2", "99,1,0", "0,1,0", ".5,.25,.25", "1,1,1", "0.9,0.05,0.05"])
def test_split_rule_is_megatrons(split):
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    for n in [*range(40), 999, 10**6 + 7]:
        for bounds, ours in zip(matrix, split_ranges(split, n), strict=True):
            if bounds is None:
                assert ours[0] == ours[1]
            else:
                assert ours == tuple(round(bound * float(n)) for bound in bounds)


@pytest.mark.parametrize("split", ["", "a,b", "1,-1", "0,0,0", "1,2,3,4", "nan", "inf,1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(DataError, match="--split is"):
        split_ranges(split, 10)


def test_stream_wraps(corpus):
    stream = TokenStream(corpus([10]), 2, 5)
    assert stream.pieces(2, 6) == [(4, 5), (2, 5), (2, 4)]
    assert stream.pieces(2, 2) == [(4, 5), (2, 3)]


def test_mock_data_is_reproducible_and_sliceable():
    dataset = MockDataset(vocab_size=100, seq_length=16, seed=0)
    whole = dataset.sample(5).tokens(0, 17)
    np.testing.assert_array_equal(MockDataset(100, 16, 0).sample(5).tokens(0, 17), whole)
    np.testing.assert_array_equal(dataset.sample(5).tokens(4, 9), whole[4:9])
    assert whole.min() >= 0 and whole.max() < 100
    assert len(np.unique(np.diff(whole) % 100)) == 1
    assert len({tuple(dataset.sample(k).tokens(0, 17)) for k in range(50)}) > 45
