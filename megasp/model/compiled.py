"""torch.compile of the element-wise bodies: each becomes one kernel, Triton's on a GPU, C++ on a CPU.

Bodies are compiled, not blocks: what a layer keeps, recompute, the queue of weight gradients and messages stay as they
are written, and no message stands inside of what is compiled. Every dim but the last is free, so a kernel serves any
length of the sequence, any tile and any batch; a body is compiled again for another dtype, another model, and where a
free dim is 1. A chain is computed in fp32 and rounded once, where PyTorch's operations round after each.
"""

import importlib.util
import inspect
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megasp import log
from megasp.errors import ConfigError
from megasp.model.elementwise import Body

FORMS = 64
"""How often one body may be compiled; PyTorch's own limit of 8 is meant for functions whose shapes are not known."""


class Compiler:
    """Compiles bodies when they are first needed.

    Attributes:
        compilations: name of a body -> how often it was compiled in this process.
    """

    def __init__(self) -> None:
        self.compilations: Counter[str] = Counter()
        self._functions: dict[Body, Callable[..., Any]] = {}
        self._lock = threading.Lock()  # a GPU's backward runs in a thread of its own

    def __call__(self, body: Body, *tensors: Tensor, **constants: float) -> Any:
        if body not in self._functions:
            with self._lock:
                self._functions.setdefault(body, self._function(body))
        return self._functions[body](*map(_free_but_last, tensors), **constants)

    def _function(self, body: Body) -> Callable[..., Any]:
        options: dict[str, Any] = {"recompile_limit": FORMS}
        if "recompile_limit" not in inspect.signature(torch.compile).parameters:  # PyTorch before 2.13
            torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
            options = {}
        function, backend = body.whole or body.eager, partial(self._compile, body)
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **options)

    def _compile(self, body: Body, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        start = time.perf_counter()
        kernel = compile_fx(graph, inputs)
        self.compilations[body.name] += 1
        dtypes = {str(x.dtype).removeprefix("torch."): None for x in inputs if isinstance(x, Tensor)}
        log.info(
            f"compiled {body.name} ({next(iter(dtypes), '')}) in {time.perf_counter() - start:.1f} s, "
            f"{self.compilations.total()} so far"
        )
        return kernel


def _free_but_last(x: Tensor) -> Tensor:
    """The values of a tensor, whose dims but the last may have any size."""
    x = x.detach()
    if x.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(x, list(range(x.dim() - 1)))
    return x


COMPILER = Compiler()
"""Of this process: a kernel is compiled once, whoever runs it."""


def compiled(body: Body, *tensors: Tensor, **constants: float) -> Any:
    """By a kernel of its own; as `Run`."""
    return COMPILER(body, *tensors, **constants)


def missing(device_type: str) -> str:
    """What torch.compile needs on a device and this machine has not; empty where it has all."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    own = ("clang++",) if sys.platform == "darwin" else ("g++",)
    name, also = ("CXX", own) if device_type == "cpu" else ("CC", ("gcc", "clang", "cc"))
    wanted = (os.environ[name],) if os.environ.get(name) else also
    if not any(shutil.which(each) for each in wanted):
        return f"a {'C++' if device_type == 'cpu' else 'C'} compiler ({' or '.join(wanted)})"
    return ""


@cache
def check(device_type: str, option: str = "--compile") -> None:
    """Refuse to compile where that does not work, by a small function.

    Raises:
        ConfigError: a compiler is missing, or fails.
    """
    lacking = missing(device_type)
    if lacking:
        raise ConfigError(
            option,
            f"torch.compile needs {lacking} on {device_type}, which this machine has not",
            f"install it (`megasp doctor` tells what it finds), or leave {option} out",
        )
    try:
        double = torch.compile(lambda x: x + x, fullgraph=True, dynamic=False)
        assert double(torch.ones(2, device=device_type)).tolist() == [2.0, 2.0]
    except Exception as error:  # a compiler that is there fails in many ways: headers, permissions, versions
        raise ConfigError(
            option,
            f"torch.compile fails on this machine: {_last_line(error)}",
            f"mend what it names (headers of Python {sys.version_info.major}.{sys.version_info.minor}, a working "
            f"compiler, a cache that can be written), or leave {option} out",
        ) from error


def _last_line(error: Exception) -> str:
    """What went wrong, without the compiler's command and PyTorch's advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "error:" in line.replace("Error:", "")]  # g++'s, where it said something
    return (found or lines or [type(error).__name__])[0]
