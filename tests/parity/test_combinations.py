"""Random combinations of all options train as one plain process does, or are refused in a sentence."""

import os
from collections import Counter

import pytest

from megasp.config.layout import Layout
from megasp.errors import ConfigError
from tests.parity.combinations import Combination, accepted, check, drawn

FULL = os.environ.get("MEGASP_FULL_MATRIX") == "1"
SEEDS, MOST_RANKS = (range(600), 8) if FULL else (range(20), 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_trains_as_one_process_or_is_refused(seed: int) -> None:
    combination = drawn(seed, MOST_RANKS)
    try:
        check(combination)
    except Exception as error:
        error.add_note(combination.said)
        raise


def test_many_are_trained_and_some_refused() -> None:
    """The draw above reaches both; with `-s` the counts are printed."""
    refused: Counter[str] = Counter()
    for seed in SEEDS:
        try:
            accepted(drawn(seed, MOST_RANKS))
        except ConfigError as refusal:
            refused[refusal.rule] += 1
    trained = len(SEEDS) - refused.total()
    print(f"{trained} combinations trained, {refused.total()} refused by {len(refused)} rules")
    assert trained >= len(SEEDS) / 3 and refused


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_what_trains_otherwise_is_seen(precision: str) -> None:
    """An option that does change the function."""
    what = {"position_embedding_type": "rope", "global_batch_size": 4, "seq_length": 24}
    with pytest.raises(AssertionError, match="differs"):
        check(Combination(Layout(), precision, what, {"rotary_base": 2.0, "norm_epsilon": 0.5}, {}))
