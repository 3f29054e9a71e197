import threading

import numpy as np
import pytest

from megasp.config.batch_schedule import BatchSchedule
from megasp.data import DocumentRules, GPTDataset, Loader, MockDataset
from megasp.errors import DataError
from megasp.shard_map import ShardMap

WHOLE = ((0, 16),)
ZIGZAG = (((0, 4), (12, 16)), ((4, 8), (8, 12)))
MOCK = MockDataset(vocab_size=97, seq_length=16, seed=1)


def loader(dataset=MOCK, ranges=WHOLE, dp_rank=0, dp_size=1, mbs=1, gbs=8, **options) -> Loader:
    options = {"vocab_size": 60000, **options}
    return Loader(
        dataset, ranges, micro_batch_size=mbs, batch=BatchSchedule(gbs), dp_rank=dp_rank, dp_size=dp_size, **options
    )


def rows(steps) -> dict[int, tuple]:
    """Tokens and labels by sample number."""
    return {
        int(k): (tuple(batch.tokens[row]), tuple(batch.labels[row]))
        for batches in steps
        for batch in batches
        for row, k in enumerate(batch.samples)
    }


def test_batch_of_one_rank():
    with loader(mbs=2, gbs=8, dp_rank=1, dp_size=2) as data:
        data.step()
        batches = data.step()
    assert [batch.samples.tolist() for batch in batches] == [[10, 11], [14, 15]]
    batch = batches[0]
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == batch.samples.dtype == np.int64
    assert batch.loss_mask.dtype == np.float32 and batch.loss_mask.all()
    np.testing.assert_array_equal(batch.tokens[1], MOCK.sample(11).tokens(0, 16))
    np.testing.assert_array_equal(batch.labels[1], MOCK.sample(11).tokens(1, 17))
    np.testing.assert_array_equal(batch.positions, np.arange(16))


@pytest.mark.parametrize(("dp", "mbs"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batch_is_the_same_for_any_data_parallel_size(dp, mbs):
    with loader() as one:
        expected = rows([one.step() for _ in range(3)])
    found: dict[int, tuple] = {}
    for rank in range(dp):
        with loader(mbs=mbs, dp_rank=rank, dp_size=dp) as data:
            found |= rows([data.step() for _ in range(3)])
    assert found == expected and sorted(found) == list(range(24))


@pytest.mark.parametrize("shards", [ShardMap.contiguous(16, 4).ranges, ZIGZAG])
def test_shards_are_slices_of_the_whole(corpus, shards):
    dataset = GPTDataset(corpus([30, 50, 21]), (0, 3), 16, seed=0)
    with loader(dataset, mbs=2) as data:
        whole = data.step()
    for rank, ranges in enumerate(shards):
        with loader(dataset, ranges, mbs=2) as data:
            shard = data.step()
        for ours, all_of_it in zip(shard, whole, strict=True):
            np.testing.assert_array_equal(ours.positions, ShardMap(16, shards).positions(rank))
            for name in ("tokens", "labels", "loss_mask"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(all_of_it, name)[:, ours.positions])


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resumes_at_consumed_samples(prefetch):
    with loader(prefetch=prefetch) as data:
        steps = [data.step() for _ in range(4)]
        assert data.consumed_samples == 32
    with loader(prefetch=prefetch) as data:
        next(data), next(data)
        position = data.consumed_samples
    assert position == 16
    with loader(prefetch=prefetch, first_sample=position) as data:
        assert rows([data.step(), data.step()]) == rows(steps[2:])


def test_loss_is_masked_where_the_input_ends_a_document():
    with loader(documents=DocumentRules(eod=5, mask_loss=True)) as data:
        for batch in data.step():
            np.testing.assert_array_equal(batch.loss_mask, batch.tokens != 5)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_token_beyond_the_vocabulary_is_explained_each_time(corpus, prefetch):
    dataset = GPTDataset(corpus([10, 10]), (0, 2), 16, seed=0)
    with loader(dataset, vocab_size=15, prefetch=prefetch) as data:
        for _ in range(2):
            with pytest.raises(DataError) as error:
                data.step()
            text = str(error.value)
            assert "token id 1" in text and "document 1 of" in text and "dataset corpus" in text and "15" in text
        assert data.consumed_samples == 0


def test_reads_ahead_in_a_thread_that_ends_with_the_loader():
    before = threading.active_count()
    with loader() as data:
        data.step()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    data.close()
