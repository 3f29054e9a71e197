"""What each attention kernel can serve: a static table, so that a configuration is refused before anything runs."""

from dataclasses import dataclass

ALIASES = {"local": "unfused"}
"""Megatron-LM's other names for the same kernel."""


@dataclass(frozen=True)
class KernelFacts:
    """Limits of one attention kernel.

    Args:
        description: what it is, for `megasp doctor`.
        devices: device types that have it -> dtypes that it takes there.
        dropout: whether it can drop attention probabilities (with our layout-independent masks).
        max_head_dim: largest head on a GPU, a multiple of 8.
        module: the optional Python module that it is in.
    """

    description: str
    devices: dict[str, tuple[str, ...]]
    dropout: bool = False
    max_head_dim: int = 1 << 30
    module: str | None = None

    def refusal(self, device: str, dtype: str, dropout: float, head_dim: int) -> str | None:
        """Why it cannot serve this, or None when it can."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.devices[device]:
            return f"on {device} it takes {', '.join(self.devices[device])}, not {dtype}"
        if dropout and not self.dropout:
            return "it has no attention dropout whose mask agrees between layouts"
        if device == "cuda" and (head_dim > self.max_head_dim or (self.max_head_dim < 1 << 30 and head_dim % 8)):
            return f"on a GPU a head must be a multiple of 8 and at most {self.max_head_dim}, not {head_dim}"
        return None


_ALL = ("float64", "float32", "bfloat16", "float16")

ATTENTION_KERNELS = {
    "fused": KernelFacts("cuDNN's attention", {"cuda": ("bfloat16", "float16")}, max_head_dim=128),
    "flash": KernelFacts(
        "flash attention (PyTorch's, arXiv 2307.08691; its CPU version on a CPU)",
        {"cuda": ("bfloat16", "float16"), "cpu": _ALL},
        max_head_dim=256,
    ),
    "flash-attn-2": KernelFacts(
        "the flash-attn package, 2.7 or later",
        {"cuda": ("bfloat16", "float16")},
        max_head_dim=256,
        module="flash_attn",
    ),
    "flash-attn-3": KernelFacts(
        "the flash-attn-3 package for Hopper GPUs",
        {"cuda": ("bfloat16", "float16")},
        max_head_dim=256,
        module="flash_attn_interface",
    ),
    "unfused": KernelFacts("the exact mathematics, the reference", {"cuda": _ALL, "cpu": _ALL}, dropout=True),
}
"""By the names of --attention-backend."""

PREFERENCE = ("flash", "fused", "unfused")
"""The order in which `auto` tries them; optional packages are used where they are named."""


def choose_kernel(backend: str, device: str, dtype: str, dropout: float, head_dim: int) -> tuple[str | None, str]:
    """The kernel that serves this and why the others do not: (name, "") or (None, reasons)."""
    backend = ALIASES.get(backend, backend)
    reasons = []
    for name in PREFERENCE if backend == "auto" else (backend,):
        reason = ATTENTION_KERNELS[name].refusal(device, dtype, dropout, head_dim)
        if reason is None:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
