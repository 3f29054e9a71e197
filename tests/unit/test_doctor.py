"""The doctor's report: complete on any machine, and each trouble with its remedy."""

import importlib.metadata
import resource
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasp import doctor, log


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lines.append)
    return lines


def find(findings: Any, name: str) -> doctor.Finding:
    return next(finding for finding in findings if finding.name == name)


def test_report(said: list[str]) -> None:
    assert doctor.run(doctor.Options()) == 0
    report = "\n".join(said)
    for title in (
        "Software",
        "Devices",
        "Attention kernels",
        "Norms, optimizer, linear layers",
        "Optional packages",
        "Network",
        "System",
    ):
        assert title in said
    for word in (torch.__version__, "gloo", "auto, cpu bf16", "host name", "GLOO_SOCKET_IFNAME", "open files"):
        assert word in report
    aligned = [line for line in said if line.startswith(("  CPU ", "  megasp ", "  NCCL_SOCKET_IFNAME "))]
    assert len(aligned) == 3 and len({len(line) - len(line[20:].lstrip()) for line in aligned}) == 1


def test_torch_unusable(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*sizes: int) -> None:
        raise RuntimeError("libtorch is damaged")

    monkeypatch.setattr(torch, "ones", broken)
    assert doctor.run(doctor.Options()) == 1
    assert any("cannot be used: RuntimeError: libtorch is damaged" in line for line in said)
    assert any("-> install PyTorch" in line for line in said)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert find(doctor.devices(), "cuda:1").found == "NVIDIA H200, 140 GiB, 989 TFLOP/s bf16"
    facts.name = "NVIDIA Future"
    assert "--peak-tflops" in find(doctor.devices(), "cuda:0").found


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "CUDA build of PyTorch" in find(doctor.devices(), "GPU").advice


def test_apex_of_pypi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert "pip uninstall apex" in find(doctor.packages(), "apex").advice
    (tmp_path / "optimizers").mkdir()
    assert find(doctor.packages(), "apex") == doctor.Finding(
        "apex", "0.1 (--norm-backend and --optimizer-backend apex)"
    )


def test_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolves_to(address: str | None) -> doctor.Finding:
        def getaddrinfo(*args: Any, **kwargs: Any) -> list[Any]:
            if address is None:
                raise socket.gaierror("not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return find(doctor.network(), "host name")

    assert "does not resolve" in resolves_to(None).found and "GLOO_SOCKET_IFNAME=" in resolves_to(None).advice
    assert "no interface" in resolves_to("203.0.113.7").found and "/etc/hosts" in resolves_to("203.0.113.7").advice
    assert "right for one machine" in resolves_to("127.0.0.1").found and not resolves_to("127.0.0.1").advice


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(4, "eth7")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth7")
    assert "loopback interface" in find(doctor.network(), "loopback").advice
    assert "no interface is called eth0" in find(doctor.network(), "GLOO_SOCKET_IFNAME").advice
    assert not find(doctor.network(), "NCCL_SOCKET_IFNAME").advice


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 8192))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=2**30))
    troubles = [finding for finding in doctor.system() if finding.advice]
    assert [finding.name for finding in troubles] == ["/dev/shm", "open files", "free disk here"]
    assert "--shm-size" in troubles[0].advice and "ulimit -n 4096" in troubles[1].advice
