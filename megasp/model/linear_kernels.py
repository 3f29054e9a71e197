"""Which products the linear layers of a model use: of tensors as they are, or in fp8 by PyTorch or a package."""

import importlib.metadata
import re
from collections.abc import Iterable

import torch

from megasp.config.fp8 import BACKENDS, Fp8Config, refusal
from megasp.config.kernels import NORM_KERNELS
from megasp.errors import ConfigError
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.fp8_transformer_engine import TransformerEngineFp8
from megasp.model.products import PLAIN, Products

FP8: dict[str, type[Fp8]] = {"torch": Fp8, "transformer-engine": TransformerEngineFp8}
"""By the names of --fp8-backend; what each serves stands in `megasp.config.fp8`."""

TRANSFORMER_ENGINE = (2, 20)
"""The first version whose products are as they are called here."""

BLOCKWISE_CUDA = (12, 9)
"""The first whose cuBLAS has products with scales of 128 values."""


def products(config: Fp8Config, layer: int, layers: int, backend: str | None = None) -> Products:
    """Those of one of a model's `layers` layers.

    Args:
        backend: what `choose` gave; without it the one that is named, PyTorch where none is.
    """
    if layer not in config.layers(layers):
        return PLAIN
    named = backend or ("torch" if config.backend == "auto" else config.backend)
    return FP8[named](config.recipe, E5M2 if config.fp8_format == "hybrid" else E4M3)


def choose(config: Fp8Config, device: torch.device) -> str:
    """The backend of fp8 on this machine: the one that is named, or the first that serves the recipe.

    Raises:
        ConfigError: none does: the GPU is too old or not NVIDIA's, or a package is not installed.
    """
    if device.type != "cuda":
        return "torch"  # emulated; a package that is named is refused before
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        raise ConfigError(f"--fp8-format on {name}", "AMD GPUs have fp8 formats of their own", "use --bf16 alone")
    capability = torch.cuda.get_device_capability(device)
    reasons, fp8_format = [], config.fp8_format or "e4m3"
    for backend in config.backends:
        reason = refusal(backend, config.recipe, capability, fp8_format) or missing(backend, config.recipe)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    served = recipes(device, config.backends)
    fix = f"--fp8-recipe {' or '.join(served)}" if served else "--bf16 alone"
    if config.recipe in served:
        fix = "--fp8-format e4m3"
    elif config.backend != "auto" and config.recipe in recipes(device):
        fix = "--fp8-backend auto"
    given = f"--fp8-recipe {config.recipe} on {name}, compute capability {'.'.join(map(str, capability))}"
    raise ConfigError(given, "; ".join(reasons), f"use {fix}")


def missing(backend: str, recipe: str) -> str | None:
    """What a backend lacks on this machine for a recipe, or None where it has everything."""
    cuda = torch.version.cuda
    if recipe == "blockwise" and cuda is not None and _version(cuda) < BLOCKWISE_CUDA:
        return f"{recipe} products need CUDA {'.'.join(map(str, BLOCKWISE_CUDA))} or later, not {cuda}"
    if backend == "torch":
        return None
    facts = NORM_KERNELS[backend]
    if not facts.installed:
        return f"it is not installed here (module {facts.module}; {facts.source})"
    version = importlib.metadata.version("transformer_engine")
    if _version(version) < TRANSFORMER_ENGINE:
        return f"it must be {'.'.join(map(str, TRANSFORMER_ENGINE))} or later, not {version}"
    return None


def _version(dotted: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", dotted)[:2]))


def recipes(device: torch.device, backends: Iterable[str] = BACKENDS) -> dict[str, list[str]]:
    """The recipes that a GPU of this machine serves in e4m3, and by which of the backends, the first of which `auto`
    picks."""
    served: dict[str, list[str]] = {}
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        for backend in backends:
            for recipe in BACKENDS[backend]:
                if not (refusal(backend, recipe, capability) or missing(backend, recipe)):
                    served.setdefault(recipe, []).append(backend)
    return served


def describe(config: Fp8Config, layers: int, device: torch.device) -> str:
    """One line for a person: which layers, what they compute in and by, and why by that."""
    own = config.layers(layers)
    gradients = "e5m2" if config.fp8_format == "hybrid" else "e4m3"
    where = "all layers" if len(own) == layers else f"layers {own.start} to {own.stop - 1}"
    what = f"linear layers of {where}, e4m3 forward, {gradients} gradients, {config.recipe} scales"
    if device.type != "cuda":
        return f"{what}; emulated on a CPU: the same numbers, and slower than bfloat16"
    backend = choose(config, device)
    if config.backend != "auto":
        return f"{what}, by {backend} (--fp8-backend)"
    if backend == "torch":
        return f"{what}, by torch (auto: PyTorch's own kernels serve this)"
    capability = torch.cuda.get_device_capability(device)
    reason = refusal("torch", config.recipe, capability, config.fp8_format or "e4m3")
    return f"{what}, by {backend} (auto: of torch, {reason})"
