"""Best-fit packing: documents whole where they fit, every token once an epoch, the same samples for any layout."""

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasp.config.batch_schedule import BatchSchedule
from megasp.data import GPTDataset, IndexedDataset, IndexedDatasetBuilder, Loader, explain, packing, phases
from megasp.data.loader import DocumentRules
from megasp.data.packing import best_fit
from megasp.errors import DataError
from megasp.shard_map import ShardMap

LENGTHS = [9, 3, 5, 2, 6, 0, 8, 16, 17, 1, 1, 30]
several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def best_fit_one_by_one(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """The textbook's, with a sorted list of (room, bin)."""
    free, bins, used = [], [-1] * len(lengths), 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] == 0:
            continue
        at = bisect_left(free, (lengths[i], -1))
        if at == len(free):
            free.append((capacity, used))
            used += 1
        room, bins[i] = free.pop(at)
        insort(free, (room - lengths[i], bins[i]))
    return bins, used


@given(st.integers(1, 70), st.data())
def test_rows_are_packed_as_each_would_be(capacity, data):
    width = data.draw(st.integers(1, 20))
    row = st.lists(st.integers(0, capacity - 1), min_size=width, max_size=width)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    bins, used = best_fit(np.array(rows, np.int64), capacity)
    for lengths, found, count in zip(rows, bins.tolist(), used.tolist(), strict=True):
        expected, expected_count = best_fit_one_by_one(lengths, capacity)
        assert count == expected_count
        assert [b for b, length in zip(found, lengths, strict=True) if length] == [b for b in expected if b >= 0]


def packed(corpus: IndexedDataset, seq_length: int, sequences: tuple[int, int] | None = None, **options) -> GPTDataset:
    return GPTDataset(corpus, sequences or (0, len(corpus)), seq_length, seed=1, packing="best-fit", **options)


def small_windows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "DOCUMENTS", (4, 8))
    patch.setattr(packing, "BLOCK", 16)
    packing.forget_packings()


@several
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.integers(1, 25))
def test_an_epoch_reads_every_token_once_and_cuts_only_what_is_longer_than_a_sample(tmp_path, lengths, seq_length):
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch)
        for path in tmp_path.glob("c.*"):
            path.unlink()
        with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
            for number, part in enumerate(np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])):
                assert len(part) == lengths[number]
                builder.add_document(part)
        dataset = packed(IndexedDataset(tmp_path / "c"), seq_length)
        samples = [dataset.sample(k) for k in range(dataset.samples_per_epoch)]
        rows = [sample.tokens(0, seq_length + 1) for sample in samples]
    read = np.concatenate([row[:-1] for row in rows])
    assert sorted(read[read > 0].tolist()) == list(range(1, sum(lengths) + 1))
    assert np.count_nonzero(read == 0) / len(read) == pytest.approx(dataset.stream.padding)
    assert dataset.tokens == len(read)
    assert all(row[: sample.length].all() for row, sample in zip(rows, samples, strict=True))
    ends = np.cumsum(lengths)
    for sample in samples:
        assert 1 <= sample.length <= seq_length + 1
        for start, stop in sample.ranges:
            document = int(np.searchsorted(ends, start, side="right"))
            begin, end = int(ends[document]) - lengths[document], int(ends[document])
            if lengths[document] <= seq_length:
                assert (start, stop) == (begin, end)
            else:
                assert (start - begin) % seq_length == 0 and stop == min(end, start + seq_length + 1)


def test_windows_do_not_depend_on_the_block(corpus, monkeypatch):
    data = corpus(np.random.default_rng(0).integers(0, 30, 500).tolist())

    def samples():
        packing.forget_packings()
        dataset = packed(data, 16)
        return [dataset.stream.sample(k) for k in range(dataset.samples_per_epoch)]

    monkeypatch.setattr(packing, "DOCUMENTS", (16, 16))
    one = samples()
    monkeypatch.setattr(packing, "BLOCK", 1)
    assert samples() == one


def test_padding_of_ordinary_documents_is_small(corpus):
    lengths = np.random.default_rng(0).lognormal(np.log(60), 1, 3000).astype(int) + 1
    dataset = packed(corpus(lengths.tolist()), 256)
    assert 0 < dataset.stream.padding < 0.02
    assert packed(corpus([10] * 30, "even"), 25).stream.padding == pytest.approx(0.2)


def test_a_split_keeps_to_itself(corpus):
    data = corpus(LENGTHS * 4)
    seen = [
        {int(t) for k in range(d.samples_per_epoch) for a, b in d.sample(k).ranges for t in range(a, b)}
        for d in (packed(data, 8, (0, 20)), packed(data, 8, (20, 48)))
    ]
    assert seen[0] == set(range(data.sequence_token(20))) and seen[1] == set(range(max(seen[0]) + 1, data.num_tokens))
    with pytest.raises(DataError, match=r"hold 0 tokens"):
        packed(data, 8, (5, 6))
    assert packed(data, 100, (9, 10)).samples_per_epoch == 1  # one token, and padding


def test_documents_of_several_sequences_stay_whole(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
        for first in range(0, 60, 6):
            builder.add_document(np.arange(first, first + 6), [2, 1, 3])
    dataset = packed(IndexedDataset(tmp_path / "c"), 13)
    ranges = [piece for k in range(dataset.samples_per_epoch) for piece in dataset.sample(k).ranges]
    assert sorted(ranges) == [(first, first + 6) for first in range(0, 60, 6)] and dataset.samples_per_epoch == 5


def loader(dataset, ranges=((0, 8),), dp_rank=0, dp_size=1, mbs=1, **options) -> Loader:
    return Loader(
        dataset, lambda _: ranges, micro_batch_size=mbs, batch=BatchSchedule(8), dp_rank=dp_rank, dp_size=dp_size,
        vocab_size=60000, **options
    )  # fmt: skip


def test_padding_and_the_token_before_it_have_no_loss(corpus):
    dataset = packed(corpus(LENGTHS), 8)
    rules = DocumentRules(reset_positions=True, reset_attention=True)
    with loader(dataset, documents=rules) as data:
        batches = data.step() + data.step()
    for batch in batches:
        sample = dataset.sample(int(batch.samples[0]))
        counted = sample.length - 1
        assert batch.loss_mask[0].tolist() == [1] * counted + [0] * (8 - counted)
        np.testing.assert_array_equal(batch.tokens[0, 1 : counted + 1], batch.labels[0, : min(counted, 7)])
        if counted == 8:  # the document goes on, and its next token is the label
            assert batch.labels[0, -1] == batch.tokens[0, -1] + 1
        lengths = [stop - start for start, stop in sample.pieces(0, 8)]
        starts = np.cumsum([0, *lengths])[: len(lengths) + (sum(lengths) < 8)]
        assert batch.document_starts[0].tolist() == starts.tolist()
        assert [p for p, at in enumerate(batch.position_ids[0]) if at == 0] == starts.tolist()


@settings(max_examples=12)
@given(
    dp=st.sampled_from([1, 2, 4]),
    mbs=st.sampled_from([1, 2]),
    shards=st.sampled_from([1, 2, 4]),
    prefetch=st.sampled_from([0, 2]),
    resume=st.integers(0, 3),
)
@pytest.mark.parametrize("how", ["stream", "best-fit"])
def test_samples_are_the_same_for_any_layout_workers_and_resume(
    tmp_path_factory, how, dp, mbs, shards, prefetch, resume
):
    folder = tmp_path_factory.mktemp("corpus")
    with IndexedDatasetBuilder(folder / "c", np.uint16) as builder:
        for length in LENGTHS:
            builder.add_document(np.arange(1, length + 1))
    dataset = GPTDataset(IndexedDataset(folder / "c"), (0, len(LENGTHS)), 8, seed=3, packing=how)
    found = {}
    for dp_rank in range(dp):
        for ranges in ShardMap.zigzag(8, shards).ranges if shards > 1 else (((0, 8),),):
            options = {"dp_rank": dp_rank, "dp_size": dp, "mbs": mbs, "prefetch": prefetch}
            for first, steps in ((0, resume), (8 * resume, 4 - resume)):  # stopped after `resume` steps, and resumed
                with loader(dataset, ranges, first_sample=first, **options) as data:
                    for batch in (batch for _ in range(steps) for batch in data.step()):
                        for row, k in enumerate(batch.samples.tolist()):
                            for at, position in enumerate(batch.positions.tolist()):
                                values = (batch.tokens[row, at], batch.labels[row, at], batch.loss_mask[row, at])
                                assert found.setdefault((k, position), values) == values
    assert sorted(found) == [(k, position) for k in range(32) for position in range(8)]
    for k in range(32):
        sample = dataset.sample(k)
        assert [found[k, p][0] for p in range(8)] == sample.tokens(0, 8).tolist()
        assert [found[k, p][1] for p in range(8)] == sample.tokens(1, 9).tolist()
        assert [found[k, p][2] for p in range(8)] == [float(p < sample.length - 1) for p in range(8)]


def wanted(prefix: str, how: str, seq_length: int = 8) -> phases.Phase:
    return phases.first_phase((prefix,), "1", seq_length, 1, BatchSchedule(4), packing=how)


def test_phases_go_on_in_a_packed_epoch_and_another_packing_begins_one(corpus):
    prefix = corpus(LENGTHS * 3).prefix
    stored = phases.go_on((), wanted(prefix, "best-fit"), 0, 0, False)
    assert phases.from_json(phases.to_json(stored)) == stored and "packed by best-fit" in phases.describe(stored[0])[0]
    again = phases.go_on(stored, replace(wanted(prefix, "best-fit"), batch=BatchSchedule(6)), 2, 8, False)
    unbroken, resumed = stored[0].dataset(), again[-1].dataset()
    assert [resumed.sample(k).ranges for k in range(8, 90)] == [unbroken.sample(k).ranges for k in range(8, 90)]
    for other in (wanted(prefix, "stream"), wanted(prefix, "best-fit", 16)):
        with pytest.raises(DataError, match=r"packed differently, .*--start-new-epoch"):
            phases.go_on(stored, other, 2, 8, False)
        later = phases.go_on(stored, other, 2, 8, True)[-1]
        assert later.parts[0].position == phases.Position(1, other.seq_length, 0) and later.dataset().sample(8).length


def test_old_checkpoints_are_of_streams(corpus):
    [entry] = phases.to_json([wanted(corpus([50]).prefix, "stream")])
    del entry["packing"]
    assert phases.from_json([entry]) == (wanted(corpus([50], "again").prefix.replace("again", "corpus"), "stream"),)


def test_explain_names_whole_documents_and_padding(corpus):
    dataset = packed(corpus([5, 2, 6, 1]), 8)
    said = {explain.describe(dataset, k).split(": ", 2)[2] for k in range(2)}
    assert said == {
        "tokens 5-6 = document 1 token 0 to document 1 token 1, then tokens 7-12 = document 2 token 0 to document 2"
        " token 5",
        "tokens 0-4 = document 0 token 0 to document 0 token 4, then tokens 13-13 = document 3 token 0 to document 3"
        " token 0, then 2 of padding",
    }
