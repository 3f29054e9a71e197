"""Bodies of element-wise work: pure functions of tensors, without autograd and without messages between ranks, and who
runs them. What is kept between a forward and its backward is listed by the Functions that call them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Body:
    """One function.

    Args:
        name: for the log.
        eager: what PyTorch's operations compute, one after another; it may use memory of its arguments again.
        whole: the same for a compiler, which makes one kernel of it, where that wants another form: whole expressions
            in place of steps that spare memory.
    """

    name: str
    eager: Callable[..., Any]
    whole: Callable[..., Any] | None = None


class Run(Protocol):
    """Computes a body.

    Args:
        tensors: whose last dim is of the model (features, channels, vocabulary), and the others of the data; 1 stands
            last where there is none of the model.
        constants: numbers that stay the same for a run.
    """

    def __call__(self, body: Body, *tensors: Tensor, **constants: float) -> Any: ...


def eager(body: Body, *tensors: Tensor, **constants: float) -> Any:
    """By PyTorch's operations, each of which reads and writes memory."""
    return body.eager(*tensors, **constants)
