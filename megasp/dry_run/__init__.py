"""Runs the real build and the real training step of one rank of any layout on fake tensors, and counts every byte.

No memory is taken and nothing is computed: tensors have shapes alone (PyTorch's FakeTensorMode), and process groups are
PyTorch's fake ones. What would be allocated is followed storage by storage, so the peak is exact, but for what kernels
take inside themselves and for the allocator's rounding. The account of `megasp memory` is checked by it.

tracker      storages that are alive, of the device and of the host, and operations
shape_cache  operators that were run on the same shapes before
stand_ins    what stands for a GPU, for copies to the host, and for code that cannot run on fake tensors
count        the build and the step of one rank
"""

from megasp.dry_run.count import Count, count, microbatch
from megasp.dry_run.stand_ins import fake_tensors
from megasp.dry_run.tracker import Tracker

__all__ = ["Count", "Tracker", "count", "fake_tensors", "microbatch"]
