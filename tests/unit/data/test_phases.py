"""Phases: whatever changes in the middle of a run, each dataset's tokens are read once an epoch."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasp.config.batch_schedule import BatchSchedule
from megasp.data import phases
from megasp.data.phases import first_phase, go_on
from megasp.errors import DataError

TOKENS = {"a": 1000, "b": 377}


def wanted(prefixes, seq_length=10, batch=4, split="1", seed=1):
    return first_phase(prefixes, split, seq_length, seed, BatchSchedule(batch))


def read(stored, samples):
    """Tokens, as (dataset, epoch, token), of the inputs of all samples of a run of `samples` samples."""
    found = []
    ends = [*(phase.sample for phase in stored[1:]), samples]
    for phase, end in zip(stored, ends, strict=True):
        dataset = phase.dataset()
        for k in range(phase.sample, end):
            part, number = dataset.locate(k)
            epoch, tokens = part.position(number).epoch, dataset.sample(k).tokens(0, phase.seq_length)
            found += [(part.name, epoch, token) for token in tokens.tolist()]
    return found


@pytest.fixture
def prefixes(corpus):
    return [corpus([size], name).prefix for name, size in TOKENS.items()]


step_changes = st.lists(
    st.tuples(
        st.sampled_from([5, 8, 10, 20, 40]),  # sequence length
        st.sampled_from([("0.7 a 0.3 b"), ("a"), ("b"), ("1 b 9 a"), ("a b")]),
        st.integers(1, 9),  # batch
        st.integers(0, 25),  # steps in the phase
    ),
    min_size=1,
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step_changes)
def test_no_token_comes_twice_in_an_epoch_and_few_are_skipped(prefixes, changes):
    folder = prefixes[0][:-1]
    stored: tuple[phases.Phase, ...] = ()
    step = samples = 0
    for seq_length, blend, batch, steps in changes:
        path = [entry if entry[0].isdigit() else folder + entry for entry in blend.split()]
        stored = go_on(stored, wanted(path, seq_length, batch), step, samples, new_epoch=False)
        assert phases.from_json(json.loads(json.dumps(phases.to_json(stored)))) == stored
        assert stored[-1].first_sample(step) == samples
        step, samples = step + steps, samples + steps * batch
    found = read(stored, samples)
    assert len(set(found)) == len(found)
    longest = max(seq_length for seq_length, *_ in changes)
    for name, size in TOKENS.items():
        epochs = sorted({epoch for dataset, epoch, _ in found if dataset == name})
        assert epochs == list(range(len(epochs)))
        for epoch in epochs[:-1]:  # each finished but for tails shorter than a sample
            count = sum(1 for dataset, e, _ in found if (dataset, e) == (name, epoch))
            assert size - count < 2 * longest


def test_a_change_of_batch_or_weights_goes_on_in_the_same_order(prefixes):
    unbroken = wanted(prefixes[:1], batch=4).dataset()
    stored = go_on((), wanted(prefixes[:1], batch=4), 0, 0, False)
    stored = go_on(stored, wanted(prefixes[:1], batch=6), 5, 20, False)
    assert len(stored) == 2 and stored[1].first_sample(7) == 32
    again = stored[1].dataset()
    for k in range(20, 260):  # two epochs and more
        np.testing.assert_array_equal(again.sample(k).tokens(0, 11), unbroken.sample(k).tokens(0, 11))


def test_nothing_changed_is_no_phase(prefixes, tmp_path):
    stored = go_on((), wanted(prefixes), 0, 0, False)
    assert go_on(stored, wanted(prefixes), 5, 20, False) == stored
    assert go_on(stored, wanted([*reversed(prefixes)]), 5, 20, False) == stored  # listed in another order


def test_a_run_that_began_elsewhere(prefixes):
    """A checkpoint that was converted has no phases: the first begins where it stands, at the beginning of the data."""
    (phase,) = go_on((), wanted(prefixes, batch=4), 5, 20, False)
    assert (phase.step, phase.sample, phase.first_sample(7)) == (5, 20, 28)
    begun = phase.dataset()
    fresh = wanted(prefixes, batch=4).dataset()
    assert [begun.sample(20 + k).tokens(0, 8).tolist() for k in range(5)] == [
        fresh.sample(k).tokens(0, 8).tolist() for k in range(5)
    ]


def test_a_corpus_may_move(prefixes, tmp_path):
    stored = go_on((), wanted(prefixes[:1]), 0, 0, False)
    (tmp_path / "elsewhere").mkdir()
    for ending in ("bin", "idx"):
        (tmp_path / f"a.{ending}").rename(tmp_path / "elsewhere" / f"a.{ending}")
    moved = go_on(stored, wanted([str(tmp_path / "elsewhere" / "a")]), 5, 20, False)
    assert len(moved) == 1 and read(moved, 30)


def test_a_longer_sample_is_put_together_of_slots_or_begins_an_epoch(prefixes):
    first = go_on((), wanted(prefixes[:1], 10), 0, 0, False)
    finish = go_on(first, wanted(prefixes[:1], 20), 5, 20, False)[-1]
    sample = finish.dataset().sample(20)
    old = first[0].dataset()
    expected = [*old.sample(20).tokens(0, 10), *old.sample(21).tokens(0, 11)]
    assert sample.tokens(0, 21).tolist() == expected
    assert sample.document_starts(20).tolist()[:2] == [0, 10]  # the text does not go on there
    assert "pieces of 10 tokens" in phases.describe(finish)[1]
    anew = go_on(first, wanted(prefixes[:1], 20), 5, 20, new_epoch=True)[-1]
    assert anew.parts[0].position.epoch == 1 and len(anew.dataset().sample(20).ranges) == 1


def test_a_changed_corpus_is_refused_or_begins_an_epoch(prefixes, corpus, tmp_path):
    stored = go_on((), wanted(prefixes[:1]), 0, 0, False)
    for path in tmp_path.glob("a.*"):
        path.unlink()
    corpus([1000, 50], "a")
    with pytest.raises(DataError, match=r"in the run so far and is now .*--start-new-epoch"):
        go_on(stored, wanted(prefixes[:1]), 5, 20, False)
    with pytest.raises(DataError, match=r"has changed .*step 1 and those after it"):
        stored[0].dataset()
    later = go_on(stored, wanted(prefixes[:1]), 5, 20, True)
    assert later[-1].parts[0].position.epoch == 1 and later[-1].parts[0].tokens == 1050


def test_another_seed_or_split(prefixes, corpus):
    stored = go_on((), wanted(prefixes[:1]), 0, 0, False)
    assert go_on(stored, wanted(prefixes[:1], seed=2), 5, 20, False)[-1].parts[0].position.epoch == 1
    many = corpus([10] * 100, "many").prefix
    stored = go_on((), wanted([many], split="9,1"), 0, 0, False)
    with pytest.raises(DataError, match="split differently"):
        go_on(stored, wanted([many], split="8,2"), 5, 20, False)


def test_no_checkpoint_no_phases(tmp_path):
    (tmp_path / "manifest.json").write_text('{"metadata": {}}')
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"--load .* cannot be used"):
            phases.read_checkpoint(folder)
