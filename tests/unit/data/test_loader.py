import os
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
        dataset,
        lambda _: ranges,
        micro_batch_size=mbs,
        batch=BatchSchedule(gbs),
        dp_rank=dp_rank,
        dp_size=dp_size,
        **options,
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


def test_a_ramp_up_changes_the_size_of_steps(corpus):
    dataset = GPTDataset(corpus([500]), (0, 1), 16, seed=0)
    ramp = BatchSchedule(8, 2, 2, 20)
    for prefetch in (0, 3):
        with Loader(
            dataset,
            lambda _: WHOLE,
            micro_batch_size=1,
            batch=ramp,
            dp_rank=0,
            dp_size=2,
            vocab_size=60000,
            prefetch=prefetch,
        ) as data:
            sizes = [len(data.step()) for _ in range(9)]
            assert data.consumed_samples == 2 * sum(sizes) == ramp.advance(0, 9)
    assert sizes == [1, 1, 1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("ranges", [WHOLE, *ZIGZAG])
def test_documents_restart_positions_and_are_told_of_the_whole_sample(corpus, ranges):
    data = corpus([5, 1, 0, 30, 7, 2])
    dataset = GPTDataset(data, (0, 6), 16, seed=0)
    rules = DocumentRules(reset_positions=True, reset_attention=True)
    with loader(dataset, ranges, mbs=2, documents=rules) as batches:
        [batch, *_] = batches.step()
    begin = np.array([0, 5, 6, 36, 43])  # the token of the stream is its own id
    for row, k in enumerate(batch.samples.tolist()):
        tokens = dataset.sample(k).tokens(0, 16)
        starts = np.flatnonzero(np.isin(tokens, begin))
        np.testing.assert_array_equal(batch.document_starts[row], np.union1d([0], starts))
        since = [i - max(s for s in batch.document_starts[row] if s <= i) for i in range(16)]
        np.testing.assert_array_equal(batch.position_ids[row], np.array(since)[batch.positions])
    with loader(dataset, ranges) as batches:
        assert batches.step()[0].position_ids is None and batches.step()[0].document_starts is None


def test_end_of_document_tokens_begin_documents_by_flag(corpus):
    dataset = GPTDataset(corpus([400]), (0, 1), 16, seed=0)
    eod = int(dataset.sample(0).tokens(3, 4)[0])
    for split_at_eod, expected in ((False, [0]), (True, [0, 4])):
        rules = DocumentRules(eod=eod, reset_attention=True, split_at_eod=split_at_eod)
        with loader(dataset, documents=rules) as batches:
            batch = batches.step()[0]
        assert batch.document_starts[0].tolist() == expected and batch.position_ids is None


@pytest.mark.parametrize("shards", [ShardMap.contiguous(40_000, 4), ShardMap.zigzag(40_000, 4)])
@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_a_rank_reads_the_bytes_of_its_own_shard(corpus, monkeypatch, shards, packing):
    """Counted where the file is read: 2 bytes for each of its tokens, and for the label after each range of them."""
    dataset = GPTDataset(corpus([100_000, 300, 2000]), (0, 3), 40_000, seed=0, packing=packing)
    k = next(k for k in range(9) if dataset.sample(k).length == 40_001)
    read, preadv = [], os.preadv

    def counted(file, buffers, offset):
        read.append(preadv(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    rules = DocumentRules(reset_positions=True, reset_attention=True)
    for ranges in shards.ranges:
        read.clear()
        with loader(dataset, ranges, gbs=1, prefetch=0, documents=rules, first_sample=k) as batches:
            batches.step()
        assert sum(read) == 2 * (10_000 + len(ranges))


def test_a_slow_disk_is_waited_for_while_the_step_before_runs(corpus, monkeypatch):
    """The reader goes on by itself, and waits in a call that leaves Python to the training thread."""
    dataset = GPTDataset(corpus([5000]), (0, 1), 16, seed=0)
    preadv, disk, reads = os.preadv, threading.Semaphore(1), threading.Semaphore(0)

    def slow(file, buffers, offset):
        reads.release()
        disk.acquire()
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    with loader(dataset, gbs=1, prefetch=2) as batches:
        batches.step()  # needs one read, and the disk serves one
        assert reads.acquire(timeout=60) and reads.acquire(timeout=60), "the next step is being read already"
        for _ in range(2):
            disk.release()
        assert reads.acquire(timeout=60), "and the one after it"
        batches.step()
        for _ in range(9):
            disk.release()
