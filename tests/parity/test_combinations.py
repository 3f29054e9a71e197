"""Random combinations of all options train as one plain process does, or are refused in a sentence."""

import os

import pytest

from megasp.config.layout import Layout
from tests.parity.combinations import Combination, Seen, check, drawn

FULL = os.environ.get("MEGASP_FULL_MATRIX") == "1"
SEEDS = range(600 if FULL else 20)
seen = Seen()


@pytest.mark.parametrize("seed", SEEDS)
def test_trains_as_one_process_or_is_refused(seed: int) -> None:
    combination = drawn(seed, 8 if FULL else 4)
    try:
        check(combination, seen)
    except Exception as error:
        error.add_note(combination.said)
        raise


def test_many_were_trained_and_some_refused() -> None:
    """The draw above reaches both; with `-s` the counts are printed."""
    refused = sum(seen.refused.values())
    print(f"{seen.trained} combinations trained, {refused} refused by {len(seen.refused)} rules")
    assert seen.trained >= len(SEEDS) / 3 and refused


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_what_trains_otherwise_is_seen(precision: str) -> None:
    """An option that does change the function."""
    what = {"position_embedding_type": "rope", "global_batch_size": 4, "seq_length": 24}
    with pytest.raises(AssertionError, match="differs"):
        check(Combination(Layout(), precision, what, {"rotary_base": 2.0, "norm_epsilon": 0.5}, {}), Seen())
