"""The attention kernels by name, which of them this machine has, and which one is meant."""

import torch

from megasp.config.kernels import ATTENTION_KERNELS, choose_kernel
from megasp.errors import ConfigError
from megasp.sequence_parallel.block_kernels import CPUFlash, Kernel, Unfused
from megasp.sequence_parallel.cuda_kernels import CUDNN, CUDAFlash, FlashAttention2, FlashAttention3

KERNELS: dict[tuple[str, str], Kernel] = {
    ("unfused", "cpu"): Unfused(),
    ("unfused", "cuda"): Unfused(),
    ("flash", "cpu"): CPUFlash(),
    ("flash", "cuda"): CUDAFlash(),
    ("fused", "cuda"): CUDNN(),
    ("flash-attn-2", "cuda"): FlashAttention2(),
    ("flash-attn-3", "cuda"): FlashAttention3(),
}
"""(name, device type) -> kernel; what each can serve stands in `megasp.config.kernels`."""


def available() -> list[tuple[str, bool, str]]:
    """(name, whether this machine has it, what it is) of every kernel."""
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    return [
        (name, bool(devices & facts.devices.keys()) and facts.installed, facts.description)
        for name, facts in ATTENTION_KERNELS.items()
    ]


def choose(backend: str, device_type: str, dtype: torch.dtype, dropout: float = 0.0, head_dim: int = 64) -> str:
    """The name of the kernel that `backend` (a name or "auto") means here.

    Raises:
        ConfigError: it cannot serve this.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    name, reasons = choose_kernel(backend, device_type, dtype_name, dropout, head_dim)
    if name is None:
        raise ConfigError(f"--attention-backend {backend}", reasons, "use --attention-backend auto")
    ATTENTION_KERNELS[name].require(f"--attention-backend {backend}")
    return name
