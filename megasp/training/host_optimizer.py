"""The optimizer's masters and moments, or those of a share of the weights, in the host's memory.

The step runs where they are: gradients come to the host and new weights go back in buckets, each beside the step of its
neighbours. Where nothing is on the host this is the optimizer on the device and nothing else.

    to the host     gradients 0 | gradients 1 | gradients 2
    step                        | bucket 0    | bucket 1  | bucket 2
    to the device                             | weights 0 | weights 1 | weights 2
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megasp.config.schema import OptimizerConfig
from megasp.data_parallel import master_dtype, on_host
from megasp.footprint import pinned
from megasp.host_copies import copier
from megasp.training.optimizer import build_optimizer

BUCKET_ELEMENTS = 16 * 2**20
"""Elements after which a bucket on the host is closed: 64 MiB of fp32."""

Bucket = list[tuple[nn.Parameter, nn.Parameter]]
"""Weights on the device, on which their gradients are left, and their masters on the host."""


class MasterOptimizer:
    """The optimizer of all master weights of a rank, which may be in two memories.

    Args:
        weights: what gradients are left on, each with its `pieces`.
        host_share: share of their elements whose masters and moments are on the host, as `on_host` chooses them. Other
            weights are their own masters.
        kernel: of the step on the device, as `build_optimizer` takes it; on the host it is PyTorch's.

    Attributes:
        masters: what is stepped and saved, in the order of `weights`: fp32 or wider, each with its `pieces`.
        parts: the optimizer on the device, which steps first, and one for each bucket on the host.
        state: master -> its moments, in place from the start; as in `torch.optim.Optimizer`.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        config: OptimizerConfig,
        host_share: float = 0.0,
        kernel: str = "torch",
    ) -> None:
        away = on_host(weights, host_share)
        self.masters = [_host_copy(w) if there else w for w, there in zip(weights, away, strict=True)]
        pairs = zip(weights, self.masters, strict=True)
        self._buckets = list(_buckets([pair for pair, there in zip(pairs, away, strict=True) if there]))
        here = [master for master, there in zip(self.masters, away, strict=True) if not there]
        steps = [[master for _, master in bucket] for bucket in self._buckets]
        kernel = kernel if here else "torch"  # the packages take no empty one
        self.parts = [build_optimizer(here, config, kernel), *(build_optimizer(masters, config) for masters in steps)]
        self.state: dict[Tensor, dict[str, Any]] = {p: kept for part in self.parts for p, kept in part.state.items()}
        device = weights[0].device if self._buckets else torch.device("cpu")
        self._to_host, self._to_device = copier(device), copier(device)  # one for each direction

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in `torch.optim.Optimizer`."""
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """Step every master by its weight's gradient, and leave the new values on the weights."""
        arriving, leaving = self._fetched(0), []
        on_device, *on_host = self.parts
        on_device.step()
        for number, (bucket, part) in enumerate(zip(self._buckets, on_host, strict=True)):
            here, arriving = arriving, self._fetched(number + 1)
            for (_, master), (gradient, mark) in zip(bucket, here, strict=True):
                self._to_host.settle(mark)
                master.grad = gradient
            part.step()
            leaving += self._sent(bucket)
            for _, master in bucket:
                master.grad = None
        for mark in leaving:
            self._to_device.wait(mark)

    def publish(self) -> None:
        """Leave the masters' values on the weights, after something else than `step` has changed them."""
        for mark in [mark for bucket in self._buckets for mark in self._sent(bucket)]:
            self._to_device.wait(mark)

    def _fetched(self, number: int) -> list[tuple[Tensor, Any]]:
        """A bucket's gradients on their way to the host, and marks of when they are there."""
        coming = self._buckets[number] if number < len(self._buckets) else []
        fetched = []
        for weight, _ in coming:
            assert weight.grad is not None, "a weight got no gradient"
            fetched.append(self._to_host.to_host(weight.grad))
        return fetched

    @torch.no_grad()
    def _sent(self, bucket: Bucket) -> list[Any]:
        """Marks of when a bucket's new values will be on the weights."""
        return [self._to_device.onto(weight, master) for weight, master in bucket]


def _host_copy(weight: nn.Parameter) -> nn.Parameter:
    """An fp32 or wider copy in the host's memory."""
    master = nn.Parameter(weight.detach().to("cpu", master_dtype(weight.dtype), copy=True))
    master.pieces = weight.pieces  # type: ignore[attr-defined]
    return master


def _buckets(pairs: Bucket) -> Iterator[Bucket]:
    """Runs of about `BUCKET_ELEMENTS`."""
    bucket: Bucket = []
    for pair in pairs:
        bucket.append(pair)
        if sum(weight.numel() for weight, _ in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def in_transit(largest: int, item: int) -> int:
    """Bytes of pinned buffers for what travels: gradients of two buckets, in fp32 or wider, and weights of two.

    Args:
        largest: elements of the largest weight, which is in a bucket of its own if need be.
        item: bytes of an element of the weights.
    """
    bucket = max(BUCKET_ELEMENTS, largest)
    return 2 * (pinned(bucket * max(item, 4)) + pinned(bucket * item))
