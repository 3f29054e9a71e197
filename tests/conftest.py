"""Property-based tests run a few examples, or many with MEGASP_FULL_MATRIX (tests/run.sh --full)."""

import os

from hypothesis import settings

settings.register_profile("some", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=2000, deadline=None)
settings.load_profile("full" if os.environ.get("MEGASP_FULL_MATRIX") else "some")
