"""`megasp doctor`: what this machine has, which kernels `auto` picks on it, and what would get in the way.

Every trouble is followed by what to change.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megasp
from megasp import log
from megasp.config.kernels import NORM_KERNELS, OPTIMIZER_KERNELS, KernelConfig

GIB = 2**30
PACKAGES = {
    "flash-attn": "attention kernels: --attention-backend flash-attn-2",
    "flash-attn-3": "attention kernels for Hopper GPUs: --attention-backend flash-attn-3",
    "transformer-engine": "--norm-backend and --optimizer-backend transformer-engine",
    "apex": "--norm-backend and --optimizer-backend apex",
    "transformers": "its models under sequence parallelism, checks of exported ones",
    "accelerate": "transformers' Trainer",
    "peft": "LoRA of transformers models",
    "deepspeed": "a peer in benchmarks",
}
"""Optional packages and what megasp uses them for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Doctor."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        found: what is there.
        advice: what to change, where it is a trouble.
    """

    name: str
    found: str
    advice: str = ""


def run(options: Options) -> int:
    """Print the report. Returns 0, or 1 if PyTorch cannot be used at all."""
    sections = {"Software": list(software())}
    torch_works = not any(finding.advice for finding in sections["Software"])
    if torch_works:
        sections |= {"Devices": list(devices()), "Attention kernels": list(attention_kernels())}
        sections |= {"Norms, optimizer, linear layers": list(other_kernels())}
    sections |= {
        "Optional packages": list(packages()),
        "Network": list(network()),
        "System": list(system()),
    }
    width = max(len(finding.name) for findings in sections.values() for finding in findings)
    for title, findings in sections.items():
        log.info(title)
        for finding in findings:
            log.info(f"  {finding.name:<{width}}  {finding.found}")
            if finding.advice:
                log.info(f"  {'':<{width}}  -> {finding.advice}")
    troubles = sum(bool(finding.advice) for findings in sections.values() for finding in findings)
    log.info(f"{troubles} of these lines ask for a change (->)" if troubles else "nothing asks for a change")
    return 0 if torch_works else 1


def software() -> Iterator[Finding]:
    """Versions. One has advice only if PyTorch cannot be used."""
    yield Finding("megasp", megasp.__version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        import torch
        import torch.distributed as dist

        assert float(torch.ones(2) @ torch.ones(2)) == 2.0
    except Exception as error:  # a broken installation fails in many ways
        advice = "install PyTorch 2.11 or later for this machine: https://pytorch.org/get-started/locally"
        yield Finding("PyTorch", f"cannot be used: {type(error).__name__}: {error}", advice)
        return
    yield Finding("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not compiled in'}")
    backends = [("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())]
    yield Finding("backends", ", ".join(name for name, available in backends if available) or "none")
    if torch.version.cuda and torch.cuda.is_available() and dist.is_nccl_available():
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def devices() -> Iterator[Finding]:
    """GPUs, cores and memory."""
    import torch

    from megasp.training.devices import known_peak

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        peak = known_peak(facts.name, torch.bfloat16)
        speed = f"{peak:g} TFLOP/s bf16" if peak else "peak not known: give --peak-tflops to see MFU"
        yield Finding(f"cuda:{index}", f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {speed}")
    if torch.cuda.device_count() == 0:
        advice = ""
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            advice = "this machine seems to have an NVIDIA GPU: install a CUDA build of PyTorch and a driver for it"
        yield Finding("GPU", "none that PyTorch can use: ranks run on the CPU with gloo", advice)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "not set; torchrun sets 1 for several ranks")
    yield Finding("CPU", f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}")
    yield Finding("threads", f"{torch.get_num_threads()} in one process; OMP_NUM_THREADS is {threads}")
    yield Finding("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB")


def attention_kernels() -> Iterator[Finding]:
    """What there is, and what `--attention-backend auto` picks for each device."""
    import torch

    from megasp.sequence_parallel import kernels

    for name, available, description in kernels.available():
        yield Finding(name, ("yes: " if available else "no: ") + description)
    for device_type in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            chosen = kernels.choose("auto", device_type, dtype)
            with_dropout = kernels.choose("auto", device_type, dtype, dropout=0.1)
            yield Finding(f"auto, {device_type} {name}", f"{chosen}; with --attention-dropout {with_dropout}")


def other_kernels() -> Iterator[Finding]:
    """Kernels of norms and optimizer, what `auto` picks for each device, and whether there is fp8."""
    import torch

    from megasp.model import compiled, linear_kernels

    gpu = torch.cuda.is_available()
    devices = ("cuda", "cpu") if gpu else ("cpu",)
    for kind, table in (("norm", NORM_KERNELS), ("optimizer", OPTIMIZER_KERNELS)):
        for name, facts in table.items():
            available = facts.installed and bool(facts.devices.keys() & set(devices))
            available &= name != "compiled" or not compiled.missing(devices[0])
            yield Finding(f"{kind}: {name}", ("yes: " if available else "no: ") + facts.description)
    for device in devices:
        norm, optimizer = KernelConfig().chosen(device, "bfloat16")
        yield Finding(f"auto, {device}", f"norms {norm}, optimizer {optimizer}")
        lacking = compiled.missing(device)
        yield Finding(f"--compile, {device}", f"no: it needs {lacking}" if lacking else "yes: torch.compile")
    if not gpu:
        yield Finding("fp8", "emulated on the CPU: for tests")
        return
    served = linear_kernels.recipes(torch.device("cuda"))
    shown = "; ".join(f"{recipe} by {' or '.join(backends)}" for recipe, backends in served.items())
    yield Finding("fp8", f"yes: {shown}" if shown else "no: it needs an NVIDIA GPU of compute capability 8.9 or higher")


def packages() -> Iterator[Finding]:
    """Versions of the packages that megasp can use but does not need."""
    for name, use in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, f"not installed ({use})")
            continue
        if name == "apex" and not _is_nvidia_apex():
            advice = (
                "NVIDIA's apex is not on PyPI: pip uninstall apex, then build it from https://github.com/NVIDIA/apex"
            )
            yield Finding(name, f"{version}, another package of that name", advice)
        else:
            yield Finding(name, f"{version} ({use})")


def _is_nvidia_apex() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any(Path(folder, "optimizers").is_dir() for folder in folders or ())


def network() -> Iterator[Finding]:
    """How ranks find each other: the host's name, interfaces, and the variables that choose one."""
    interfaces = {name: _address(name) for _, name in socket.if_nameindex()}
    listed = [f"{name} ({address})" if address else name for name, address in interfaces.items()]
    yield Finding("interfaces", ", ".join(listed) or "none")
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    others = [name for name, address in interfaces.items() if address and not address.startswith("127.")]
    advice = "give the container a loopback interface: ranks of one host talk over it"
    yield Finding("loopback", loopback or "none", "" if loopback else advice)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        # NCCL takes prefixes, lists, and the signs ^ and =; gloo takes names in a list.
        wanted = [item.lstrip("^=") for item in (value or "").split(",") if item]
        missing = [item for item in wanted if not any(name.startswith(item) for name in interfaces)]
        advice = f"no interface is called {missing[0]}: unset it, or name one of the above" if missing else ""
        yield Finding(variable, value or "not set", advice)
    yield _host_name(f"export GLOO_SOCKET_IFNAME={others[0] if others else loopback or 'the interface to use'}")


def _host_name(export: str) -> Finding:
    """Whether the host's name leads to an address of this machine: gloo looks it up when no interface is named."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return Finding("host name", f"{name}, which does not resolve", f"add it to /etc/hosts, or {export}")
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        found = f"{name} -> {address}, which no interface of this machine has"
        return Finding("host name", found, f"mend /etc/hosts, or {export}")
    if str(address).startswith("127.") or address == "::1":
        return Finding("host name", f"{name} -> {address}: right for one machine; for several {export} on each")
    return Finding("host name", f"{name} -> {address}")


def _address(interface: str) -> str:
    """IPv4 address of an interface; empty if it has none, or where the system (not Linux) is asked otherwise."""
    if platform.system() != "Linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, 0x8915, interface.encode()[:15].ljust(256, b"\0"))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def system() -> Iterator[Finding]:
    """Limits that training meets: shared memory, open files, disk."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        advice = "NCCL wants 1 GiB: start the container with --shm-size=1g or --ipc=host" if size < GIB else ""
        yield Finding(str(shared), f"{size / GIB:.2f} GiB", advice)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= 1024
    limit = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    can_rise = most == resource.RLIM_INFINITY or most >= 4096
    advice = f"{'run `ulimit -n 4096`' if can_rise else 'have the hard limit raised'}: every connection is an open file"
    yield Finding("open files", limit, "" if enough else advice)
    free = shutil.disk_usage(".").free
    advice = "a checkpoint takes about 16 bytes for each parameter: give --save a larger disk"
    yield Finding("free disk here", f"{free / GIB:.0f} GiB", advice if free < 5 * GIB else "")
    if not os.access(".", os.W_OK):
        yield Finding("this directory", "cannot be written", "change to a directory of your own, or name one in --save")
