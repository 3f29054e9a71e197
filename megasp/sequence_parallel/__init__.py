"""Attention over a sequence that is split between ranks: kernels, and Ulysses, which wraps any of them."""

from megasp.sequence_parallel.attend import attend
from megasp.sequence_parallel.ulysses import UlyssesAttention

__all__ = ["UlyssesAttention", "attend"]
