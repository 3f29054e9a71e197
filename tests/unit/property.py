"""How many examples a property-based test runs: a fixed sample, many more with `tests/run.sh --full`."""

import os

from hypothesis import settings


def sample(examples: int) -> settings:
    """The same examples in every run, none stored, no time limit for one (machines are shared)."""
    full = os.environ.get("MEGASP_FULL_MATRIX") == "1"
    return settings(max_examples=50 * examples if full else examples, deadline=None, derandomize=True, database=None)
