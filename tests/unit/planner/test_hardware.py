"""Hardware tables: every known part is whole, and a user's file is read or refused in words."""

from pathlib import Path

import pytest
import yaml

from megasp.errors import ConfigError
from megasp.planner.hardware import Curve, known, load


@pytest.mark.parametrize("name", known())
def test_known_parts(name: str) -> None:
    gpu = load(name)
    assert gpu.memory > 30e9 and gpu.matmul["bf16"] < gpu.peak["bf16"]
    assert gpu.all_reduce(1e5) <= gpu.all_reduce(1e9)
    for kernel in gpu.attention.values():
        assert kernel.rate(False, 128, 16384) > kernel.rate(False, 128, 512) > 1e13
        assert kernel.rate(True, 64, 2048) > 1e13
    assert "flash" in gpu.attention


def test_curve_is_level_beyond_its_ends() -> None:
    curve = Curve((1.0, 100.0), (10.0, 30.0))
    assert (curve(0.1), curve(10.0), curve(1e6)) == (10.0, 20.0, 30.0)


def test_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "h100-80", "name": "mine", "matmul_TFLOPS": {"bf16": 500}}))
    gpu = load(str(file))
    assert gpu.matmul == {"bf16": 500e12} and gpu.node_gpus == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "valid YAML|readable YAML"),
        ("hello", "entry: value"),
        ("base: h1000", "base h1000"),
        ("base: h100-80\nspeed: 3", "entry speed"),
        ("name: x", "no entry"),
        ("base: h100-80\nmemory_GB: large", "entries must be"),
        ("base: h100-80\nmemory_GB: -80", "memory_GB -80: every figure is a positive number"),
        ("base: h100-80\nhost: {link_GBps: 0, memory_GBps: 1, memory_GB: 1}", "host link_GBps 0"),
        ("base: h100-80\nhost: {link_GBps: 50, memory_GBps: 1}", "no entry 'memory_GB'"),
        ("base: h100-80\nnode: {gpus: 8, gather_GBps: 9, collectives: {MB: [1, 2], GBps: [3]}}", "as many rates"),
        ("base: h100-80\nmatmul_TFLOPS: {fp8: 9}", "matmul_TFLOPS and peak_TFLOPS: bf16"),
        ("base: h100-80\nattention_TFLOPS: {cudnn: {}}", "attention_TFLOPS cudnn is none of"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(str(file))


def test_unknown_part_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="use h100-80"):
        load("h100")
