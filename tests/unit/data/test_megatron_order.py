"""Megatron's order, with megatron-core's own GPTDataset and BlendedDataset as the oracle."""

import numpy as np
import pytest

from megasp.data import IndexedDataset, IndexedDatasetBuilder, split_ranges
from megasp.data.megatron_order import blend
from megasp.errors import DataError


class Tokenizer:
    vocab_size, eod, unique_identifiers = 32000, 0, {"class": "Tokenizer"}


@pytest.fixture(scope="module")
def build():
    """build(prefixes, weights, length, seed, samples, split) -> megatron-core's [train, valid, test]."""
    builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")

    def build(prefixes, weights, length, seed, samples, split):
        config = gpt.GPTDatasetConfig(
            random_seed=seed, sequence_length=length, blend=(prefixes, weights), split=split, path_to_cache=None,
            tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
            create_attention_mask=False, mid_level_dataset_surplus=0.005,
        )  # fmt: skip
        return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, samples, lambda: True, config).build()

    return build


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name, documents, mean in (("a", 120, 60), ("b", 50, 150), ("c", 300, 9)):
        with IndexedDatasetBuilder(folder / name, np.uint16) as made:
            for length in np.maximum(1, random.lognormal(np.log(mean), 1, documents)).astype(int):
                made.add_document(random.integers(1, 32000, length))
    return [str(folder / name) for name in "abc"]


def ours(prefixes, weights, length, seed, samples, split, subset):
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    ranges = [split_ranges(split, len(corpus))[subset] for corpus in corpora]
    return blend(list(zip(corpora, ranges, strict=True)), weights, length, seed, samples)


@pytest.mark.parametrize("seed", [1234, 1, 7, 99])
@pytest.mark.parametrize(
    ("corpus", "length", "samples", "split"),
    [
        (0, 64, (50, 10, 5), "949,40,11"),
        (0, 33, (900, 0, 0), "1,0,0"),
        (1, 64, (260, 40, 0), "80,20,0"),
        (2, 128, (60, 9, 9), "70,15,15"),
        (2, 16, (1000, 0, 0), "1,0,0"),
    ],
)
def test_one_corpus(build, prefixes, seed, corpus, length, samples, split):
    theirs = build([prefixes[corpus]], None, length, seed, list(samples), split)
    for subset, (dataset, count) in enumerate(zip(theirs, samples, strict=True)):
        if dataset is None or not count:
            continue
        found = ours([prefixes[corpus]], None, length, seed, count, split, subset)
        assert len(found) == len(dataset)
        for k in range(len(dataset)):
            tokens = found.sample(k).tokens(0, length + 1)
            np.testing.assert_array_equal(tokens[:-1], dataset[k]["tokens"].numpy())
            np.testing.assert_array_equal(tokens[1:], dataset[k]["labels"].numpy())


@pytest.mark.parametrize("seed", [5, 1234])
@pytest.mark.parametrize("weights", [[0.3, 0.7, 0.1], [1.0, 1e-3, 5.0], [3.0, 3.0, 3.0], None])
def test_blends(build, prefixes, seed, weights):
    theirs = build(prefixes, weights, 32, seed, [400, 0, 0], "1,0,0")[0]
    found = ours(prefixes, weights, 32, seed, 400, "1,0,0", 0)
    assert len(found) == len(theirs)
    for k in range(len(theirs)):
        np.testing.assert_array_equal(found.sample(k).tokens(0, 32), theirs[k]["tokens"].numpy())


def test_ranges_and_documents_of_a_sample(prefixes):
    dataset = ours(prefixes[2:], None, 64, 1, 100, "1", 0)
    sample, corpus = dataset.sample(3), dataset.corpus
    whole = sample.tokens(0, 65)
    for start, stop in [(0, 1), (5, 40), (64, 65), (9, 9)]:
        np.testing.assert_array_equal(sample.tokens(start, stop), whole[start:stop])
    starts = sample.document_starts(64)
    assert starts[0] == 0 and len(starts) == len(sample.pieces(0, 64)) > 3
    token = sample.pieces(int(starts[2]), 64)[0][0]
    assert corpus.document_range(corpus.document_at(token))[0] == token


def test_beyond_the_end(prefixes):
    dataset = ours(prefixes[:1], None, 64, 1, 10, "1", 0)
    with pytest.raises(DataError, match="ends after"):
        dataset.sample(len(dataset))
    with pytest.raises(DataError, match="needs 100001"):
        ours(prefixes[:1], None, 10**5, 1, 10, "1", 0)
