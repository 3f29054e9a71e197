"""What a GPU, its node and its network can do: a YAML file for each part, every figure with its source beside it.

`gpus/` holds known parts; `--gpu FILE.yaml` reads another, of the same form, as `megasp calibrate` writes it. A file
may begin from a known part (`base: h100-80`) and give only what differs.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megasp.config.kernels import ATTENTION_KERNELS
from megasp.errors import ConfigError

FOLDER = Path(__file__).parent / "gpus"


@dataclass(frozen=True)
class Curve:
    """A rate by size, straight between measured points in log size, and level beyond them."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, sizes: Sequence[float], rates: Sequence[float], size_unit: float, rate_unit: float) -> "Curve":
        """From a table's two rows.

        Raises:
            ValueError: they do not have as many entries, or sizes do not grow.
        """
        if len(sizes) != len(rates) or not sizes or sorted(set(sizes)) != list(sizes):
            raise ValueError(f"{len(sizes)} growing sizes {list(sizes)} need as many rates, not {len(rates)}")
        return cls(tuple(size * size_unit for size in sizes), tuple(rate * rate_unit for rate in rates))

    def __call__(self, size: float) -> float:
        if size <= self.sizes[0]:
            return self.rates[0]
        for (low, left), (high, right) in pairwise(zip(self.sizes, self.rates, strict=True)):
            if size <= high:
                return left + (right - left) * math.log(size / low) / math.log(high / low)
        return self.rates[-1]


@dataclass(frozen=True)
class AttentionRates:
    """FLOP/s of one attention kernel, causal counted half: direction -> head size -> rate by length."""

    forward: Mapping[int, Curve]
    backward: Mapping[int, Curve]

    def rate(self, backward: bool, head_dim: int, length: float) -> float:
        """FLOP/s at the nearest measured head size."""
        curves = self.backward if backward else self.forward
        return curves[min(curves, key=lambda measured: abs(measured - head_dim))](length)


@dataclass(frozen=True)
class Hardware:
    """One GPU and what it is connected to. Rates are per second, in FLOPs and bytes.

    Attributes:
        memory: bytes of the GPU.
        capability: compute capability, by which fp8 recipes are refused; None where the file does not say.
        sms: streaming multiprocessors; a GEMM's last wave of tiles leaves some idle.
        memory_rate: what copies reach.
        matmul: precision -> the best rate that matrix products reach.
        peak: precision -> the datasheet's rate, for MFU alone.
        attention: kernel -> its rates.
        node_gpus: GPUs that the fast links connect.
        all_reduce: bus bandwidth inside a node by bytes of a message.
        gather_rate: largest bus bandwidth of the other collectives there.
        network_rate: line rate of one network port.
        ports: network ports of a node.
        host_rate, host_memory_rate, host_memory: link to the host; a node's memory.
    """

    name: str
    memory: float
    capability: tuple[int, int] | None
    sms: int
    memory_rate: float
    matmul: Mapping[str, float]
    peak: Mapping[str, float]
    attention: Mapping[str, AttentionRates]
    node_gpus: int
    all_reduce: Curve
    gather_rate: float
    network_rate: float
    ports: int
    host_rate: float
    host_memory_rate: float
    host_memory: float

    def with_network(self, rate: float, ports: int) -> "Hardware":
        """The same node on another network."""
        return dataclasses.replace(self, network_rate=rate, ports=ports)


def known() -> list[str]:
    """Names of the parts in `gpus/`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load(name: str) -> Hardware:
    """The part of that name, or of that file.

    Raises:
        ConfigError: no such part or file, or a file with an entry missing or unknown.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name.lower()}.yaml"
        if not path.exists():
            near = difflib.get_close_matches(name.lower(), known(), 1, 0.3)
            raise ConfigError(
                f"--gpu {name}",
                f"the known ones are {', '.join(known())}",
                f"use {near[0] if near else known()[0]}, or give a file that `megasp calibrate` wrote",
            )
    values = _read(path)
    try:
        return _build(values)
    except KeyError as missing:
        raise ConfigError(
            f"--gpu {path}", f"it has no entry {missing}", "add it, or begin with base: h100-80"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--gpu {path}", f"its entries must be as in a known part's file ({error})", "compare with " + str(FOLDER)
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"--gpu {path}", f"it must be a readable YAML file ({words})", "check the file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--gpu {path}", "it must hold `entry: value` lines", f"see {FOLDER / 'h100-80.yaml'}")
    base = values.pop("base", None)
    if base is not None and base not in known():
        raise ConfigError(f"--gpu {path}, base {base}", f"it is one of {', '.join(known())}", "name one of them")
    everything = (_read(FOLDER / f"{base}.yaml") if base else {}) | values
    _check_positive(path, {name: value for name, value in everything.items() if name != "compute_capability"})
    unknown = sorted(everything.keys() - _ENTRIES)
    if unknown:
        raise ConfigError(f"--gpu {path}, entry {unknown[0]}", f"it is one of {', '.join(_ENTRIES)}", "leave it out")
    return everything


def _check_positive(path: Path, value: object, where: str = "") -> None:
    """Refuse a figure that no machine has.

    Raises:
        ConfigError: a number that is not positive and finite.
    """
    if isinstance(value, int | float) and not (0 < value < math.inf):
        raise ConfigError(
            f"--gpu {path}, {where} {value}", "every figure is a positive number", "measure it, or leave it to base"
        )
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        _check_positive(path, part, f"{where} {name}".strip())


_ENTRIES = (
    "name", "memory_GB", "compute_capability", "sms", "hbm_TBps", "matmul_TFLOPS", "peak_TFLOPS", "attention_TFLOPS",
    "node", "network", "host",
)  # fmt: skip


def _build(values: dict[str, Any]) -> Hardware:
    node, host = values["node"], values["host"]
    capability = values.get("compute_capability")
    collectives = node["collectives"]
    attention = {}
    for kernel, table in values["attention_TFLOPS"].items():
        if kernel not in ATTENTION_KERNELS:
            raise ValueError(f"attention_TFLOPS {kernel} is none of {', '.join(ATTENTION_KERNELS)}")
        curves = [
            {int(head): Curve.of(table["lengths"], rates, 1.0, 1e12) for head, rates in table[direction].items()}
            for direction in ("forward", "backward")
        ]
        attention[kernel] = AttentionRates(*curves)
    if "flash" not in attention:
        raise KeyError("attention_TFLOPS: flash")
    if "bf16" not in values["matmul_TFLOPS"] or "bf16" not in values["peak_TFLOPS"]:
        raise KeyError("matmul_TFLOPS and peak_TFLOPS: bf16")
    return Hardware(
        name=str(values["name"]),
        memory=values["memory_GB"] * 1e9,
        capability=(int(capability[0]), int(capability[1])) if capability is not None else None,
        sms=int(values["sms"]),
        memory_rate=values["hbm_TBps"] * 1e12,
        matmul={precision: rate * 1e12 for precision, rate in values["matmul_TFLOPS"].items()},
        peak={precision: rate * 1e12 for precision, rate in values["peak_TFLOPS"].items()},
        attention=attention,
        node_gpus=int(node["gpus"]),
        all_reduce=Curve.of(collectives["MB"], collectives["GBps"], 1e6, 1e9),
        gather_rate=node["gather_GBps"] * 1e9,
        network_rate=values["network"]["GBps"] * 1e9,
        ports=int(values["network"]["per_node"]),
        host_rate=host["link_GBps"] * 1e9,
        host_memory_rate=host["memory_GBps"] * 1e9,
        host_memory=host["memory_GB"] * 1e9,
    )
