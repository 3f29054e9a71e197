"""The static table of attention kernels: what `auto` picks, and why a kernel cannot serve."""

import pytest

from megasp.config.kernels import ATTENTION_KERNELS, PREFERENCE, choose_kernel
from megasp.config.schema import TrainingConfig
from megasp.sequence_parallel.kernels import KERNELS


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "head_dim", "picked"),
    [
        ("cpu", "float32", 0.0, 64, "flash"),
        ("cpu", "float64", 0.0, 7, "flash"),
        ("cpu", "float32", 0.1, 64, "unfused"),
        ("cuda", "bfloat16", 0.0, 128, "flash"),
        ("cuda", "bfloat16", 0.0, 256, "flash"),
        ("cuda", "bfloat16", 0.0, 264, "unfused"),
        ("cuda", "bfloat16", 0.0, 12, "unfused"),  # not a multiple of 8
        ("cuda", "float32", 0.0, 64, "unfused"),
        ("cuda", "bfloat16", 0.1, 64, "unfused"),
    ],
)
def test_auto(device: str, dtype: str, dropout: float, head_dim: int, picked: str) -> None:
    assert choose_kernel("auto", device, dtype, dropout, head_dim) == (picked, "")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "dropout", "head_dim", "reason"),
    [
        ("fused", "cpu", "bfloat16", 0.0, 64, "fused: it runs on cuda, not on cpu"),
        ("flash", "cuda", "float32", 0.0, 64, "flash: on cuda it takes bfloat16, float16, not float32"),
        ("flash", "cpu", "float32", 0.1, 64, "flash: it has no attention dropout whose mask agrees between layouts"),
        ("fused", "cuda", "float16", 0.0, 136, "at most 128, not 136"),
        ("flash", "cuda", "float16", 0.0, 12, "a multiple of 8 and at most 256, not 12"),
    ],
)
def test_refusals(backend: str, device: str, dtype: str, dropout: float, head_dim: int, reason: str) -> None:
    name, said = choose_kernel(backend, device, dtype, dropout, head_dim)
    assert name is None and reason in said


def test_auto_says_every_reason() -> None:
    name, said = choose_kernel("auto", "tpu", "float32", 0.0, 64)
    assert name is None and [part.split(":")[0] for part in said.split("; ")] == list(PREFERENCE)


def test_megatrons_name() -> None:
    assert choose_kernel("local", "cpu", "float32", 0.1, 64) == ("unfused", "")


def test_table_registry_and_flag_agree() -> None:
    pairs = {(name, device) for name, facts in ATTENTION_KERNELS.items() for device in facts.devices}
    assert pairs == set(KERNELS)
    assert set(PREFERENCE) == {name for name, facts in ATTENTION_KERNELS.items() if not facts.module}
    choices = TrainingConfig.__dataclass_fields__["attention_backend"].metadata["choices"]
    assert set(choices) == {"auto", "local", *ATTENTION_KERNELS}
