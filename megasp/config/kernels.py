"""What each kernel can serve, of attention, norms and the optimizer: static tables, so that a configuration is refused
before anything runs; and the flags that choose among the last two."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megasp.config.flags import flag
from megasp.errors import ConfigError

ALIASES = {"local": "unfused"}
"""Megatron-LM's other names for the same kernel."""


@dataclass(frozen=True)
class KernelFacts:
    """Limits of one kernel.

    Args:
        description: what it is, for `megasp doctor`.
        devices: device types that have it -> dtypes that it takes there.
        dropout: whether it can drop attention probabilities (with our layout-independent masks).
        max_head_dim: largest head on a GPU, a multiple of 8.
        module: the optional Python module that it is in.
        source: where that comes from.
    """

    description: str
    devices: dict[str, tuple[str, ...]]
    dropout: bool = False
    max_head_dim: int = 1 << 30
    module: str | None = None
    source: str = ""

    def refusal(self, device: str, dtype: str, dropout: float = 0.0, head_dim: int = 8) -> str | None:
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

    @property
    def installed(self) -> bool:
        """Whether this machine has its module."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def require(self, option: str) -> None:
        """Refuse a kernel whose module is not here.

        Raises:
            ConfigError: it is not installed.
        """
        if not self.installed:
            raise ConfigError(
                option,
                f"{self.description} is not installed here (module {self.module})",
                f"{self.source or 'install it'}, or use {option.split()[0]} auto",
            )


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
"""The order in which `auto` tries them; optional packages are used where they are named, whatever is installed: a run
computes the same wherever it starts, and what it computes by is what tests compare with."""


_GPU: dict[str, tuple[str, ...]] = {"cuda": ("bfloat16", "float16", "float32")}
_APEX = "build NVIDIA's apex with its CUDA extensions (https://github.com/NVIDIA/apex)"
_TRANSFORMER_ENGINE = "pip install transformer-engine[pytorch]"

NORM_KERNELS = {
    "unfused": KernelFacts("the exact mathematics, the reference", {"cuda": _ALL, "cpu": _ALL}),
    "compiled": KernelFacts("torch.compile's", {"cuda": _ALL, "cpu": _ALL}),
    "fused": KernelFacts("PyTorch's fused kernels", _GPU),
    "apex": KernelFacts("NVIDIA's apex", _GPU, module="fused_layer_norm_cuda", source=_APEX),
    "transformer-engine": KernelFacts(
        "Transformer Engine, 2.0 or later", _GPU, module="transformer_engine_torch", source=_TRANSFORMER_ENGINE
    ),
}
"""By the names of --norm-backend."""

NORM_PREFERENCE = ("fused", "unfused")

OPTIMIZER_KERNELS = {
    "torch": KernelFacts("PyTorch's fused AdamW", {"cuda": _ALL, "cpu": _ALL}),
    "apex": KernelFacts("NVIDIA's apex, FusedAdam", {"cuda": ("float32",)}, module="amp_C", source=_APEX),
    "transformer-engine": KernelFacts(
        "Transformer Engine's FusedAdam",
        {"cuda": ("float32",)},
        module="transformer_engine_torch",
        source=_TRANSFORMER_ENGINE,
    ),
}
"""By the names of --optimizer-backend; dtypes are those of master weights."""

OPTIMIZER_PREFERENCE = ("torch",)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Kernels of norms and optimizer, and whether the rest between matrix products is compiled."""

    compile: bool = flag(
        False,
        "make one kernel each of norms, rotary positions, activations, dropout and the loss by torch.compile; needs a "
        "C++ compiler on a CPU, Triton and a C compiler on a GPU, and a minute at the start",
    )
    norm_backend: str = flag(
        "auto",
        "kernels of the norms; auto picks PyTorch's best for the device (compiled with --compile), never a package, "
        "so that a run computes the same whatever is installed: apex and transformer-engine are used where they are "
        "named; unfused is the exact reference",
        choices=("auto", *NORM_KERNELS),
    )
    optimizer_backend: str = flag(
        "auto",
        "kernels of AdamW's step; auto is PyTorch's, and never a package, so that a run computes the same whatever is "
        "installed: apex and transformer-engine are used where they are named",
        choices=("auto", *OPTIMIZER_KERNELS),
    )

    def described(self, norm: str, optimizer: str, device: str) -> str:
        """Those chosen of both, and why, for a person."""
        norms = _explained(NORM_KERNELS, "--norm-backend", self.norm_backend, norm, device)
        steps = _explained(OPTIMIZER_KERNELS, "--optimizer-backend", self.optimizer_backend, optimizer, device)
        return f"norms {norms}, optimizer {steps}"

    def norm(self, device: str, dtype: str) -> tuple[str | None, str]:
        """As `choose`."""
        preference = ("compiled",) if self.compile else NORM_PREFERENCE
        return choose(NORM_KERNELS, preference, self.norm_backend, device, dtype)

    def optimizer(self, device: str, dtype: str = "float32") -> tuple[str | None, str]:
        """As `choose`."""
        return choose(OPTIMIZER_KERNELS, OPTIMIZER_PREFERENCE, self.optimizer_backend, device, dtype)

    def chosen(self, device: str, dtype: str, masters: str = "float32") -> tuple[str, str]:
        """The kernels of the norms, which compute in `dtype`, and of the optimizer, on master weights.

        Raises:
            ConfigError: one that is named cannot serve this.
        """
        norm, why_norm = self.norm(device, dtype)
        if norm is None:
            raise ConfigError(f"--norm-backend {self.norm_backend}", why_norm, "use --norm-backend auto")
        optimizer, why = self.optimizer(device, masters)
        if optimizer is None:
            raise ConfigError(f"--optimizer-backend {self.optimizer_backend}", why, "use --optimizer-backend auto")
        return norm, optimizer


def _explained(table: Mapping[str, KernelFacts], option: str, backend: str, chosen: str, device: str) -> str:
    if backend != "auto":
        return f"{chosen} ({option})"
    others = [name for name, facts in table.items() if facts.module and facts.installed and device in facts.devices]
    also = f"; {' or '.join(others)}, installed, where {option} names it" if others else ""
    return f"{chosen} (auto: PyTorch's own{also})"


def choose(
    table: Mapping[str, KernelFacts],
    preference: Sequence[str],
    backend: str,
    device: str,
    dtype: str,
    dropout: float = 0.0,
    head_dim: int = 8,
) -> tuple[str | None, str]:
    """The kernel of a table that serves this and why the others do not: (name, "") or (None, reasons)."""
    reasons = []
    for name in preference if backend == "auto" else (backend,):
        reason = table[name].refusal(device, dtype, dropout, head_dim)
        if reason is None:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def choose_kernel(backend: str, device: str, dtype: str, dropout: float, head_dim: int) -> tuple[str | None, str]:
    """The attention kernel that serves this, as `choose`."""
    return choose(ATTENTION_KERNELS, PREFERENCE, ALIASES.get(backend, backend), device, dtype, dropout, head_dim)
