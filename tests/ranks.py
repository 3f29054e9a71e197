"""Gloo ranks for tests; see `megasp.local_ranks`."""

from megasp.local_ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "run_ranks"]
