"""Attention over a sequence that is split between ranks.

blocks        which queries see which keys: rectangles of three kinds of mask
schedules     who computes them when, and what travels: ring, LightSeq, all-gather; drawn and simulated
work          both, for one microbatch
shards        which positions each rank holds then: chosen by the work
block_kernels attention of one block, with its log-sum-exp: the contract and every device's kernels
cuda_kernels  the same on CUDA
kernels       their names
parcels       partial results, and tensors in one message
attend        runs a schedule on the ring axis
chunks        the same where the owners are chunks of one rank's sequence, one after another
sparse        any pattern, by a user's mask function, on one ring rank
ulysses       exchanges sequence for heads around it
attention     the whole, as the model uses it
traffic       closed forms of the bytes
"""

from megasp.sequence_parallel.attend import Kept, attend
from megasp.sequence_parallel.attention import SequenceAttention
from megasp.sequence_parallel.blocks import Mask
from megasp.sequence_parallel.chunks import Chunk, Past
from megasp.sequence_parallel.sparse import SparseMask, sparse_attend
from megasp.sequence_parallel.ulysses import UlyssesAttention
from megasp.sequence_parallel.work import Documents, Work

__all__ = [
    "Chunk",
    "Documents",
    "Kept",
    "Mask",
    "Past",
    "SequenceAttention",
    "SparseMask",
    "UlyssesAttention",
    "Work",
    "attend",
    "sparse_attend",
]
