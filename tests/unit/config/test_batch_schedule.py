"""Ramp-up in closed form, against the loop that it replaces and against megatron-core."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.config.batch_schedule import BatchSchedule


@st.composite
def schedules(draw):
    start, increment, levels = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return BatchSchedule(start + increment * levels, start, increment, draw(st.integers(1, 300)))


@given(schedules(), st.integers(0, 200), st.integers(0, 60))
def test_closed_forms_agree_with_the_loop(schedule, consumed, steps):
    now, taken = consumed, [consumed]
    for _ in range(steps):
        assert schedule.at(now) in schedule.sizes()
        now += schedule.at(now)
        taken.append(now)
    assert schedule.advance(consumed, steps) == now
    assert [schedule.steps(consumed, sample) for sample in taken] == list(range(steps + 1))
    assert schedule.steps(consumed, now + schedule.at(now) - 1) == steps


@given(schedules(), st.lists(st.integers(0, 400), max_size=20))
def test_sizes_are_megatrons(schedule, consumed):
    calculator = pytest.importorskip("megatron.core.num_microbatches_calculator")
    theirs = calculator.RampupBatchsizeNumMicroBatchesCalculator(
        schedule.final, 1, 1, False, 1, schedule.start, schedule.increment, schedule.samples
    )
    for samples in consumed:
        theirs.update(samples, consistency_check=False)
        increments = (schedule.final - schedule.start) // schedule.increment
        if samples * increments % schedule.samples:  # there its floating-point division may fall short of the level
            assert schedule.at(samples) == theirs.get_current_global_batch_size()


def test_without_a_ramp_up():
    schedule = BatchSchedule(8)
    assert (schedule.at(5), schedule.sizes(), schedule.advance(3, 4), schedule.steps(3, 34)) == (8, [8], 35, 3)


def test_a_long_ramp_up_costs_nothing():
    schedule = BatchSchedule(4096, 16, 16, 10**12)
    assert schedule.steps(0, schedule.advance(0, 10**9)) == 10**9
