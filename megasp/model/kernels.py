"""Who computes a model's element-wise work: two choices that every module is given as one."""

from dataclasses import dataclass

from megasp.model.elementwise import Run, eager
from megasp.model.norm_kernels import UNFUSED, NormKernel


@dataclass(frozen=True)
class Kernels:
    """Kernels between the matrix products.

    Args:
        norm: of the norms.
        run: who runs the bodies of the rest: rotary positions, activations, dropout, the loss.
    """

    norm: NormKernel = UNFUSED
    run: Run = eager


EAGER = Kernels()
"""The exact mathematics in PyTorch's operations."""
