"""Gloo ranks for tests; see `megasp.local_ranks`."""

from megasp import local_ranks
from megasp.local_ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "run_ranks"]

# Ranks are forked with these: to import them in each would take longer than what most tests do there.
local_ranks.PRELOAD += (
    "pytest",
    "hypothesis",
    "megasp.cli",
    "megasp.verify",
    "megasp.training.pretrain",
    "megasp.huggingface",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2")),
    "transformers.trainer",
    "accelerate",
    "peft",
)
