"""AdamW (arXiv 1711.05101) on master weights: matrices decay, biases and norm weights do not.

Master weights and moments, or those of a share of the weights, may be in the host's memory. The step runs where they
are: gradients come to the host and new weights go back in buckets, each beside the step of its neighbours.

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
from megasp.model.offload import copier

BUCKET_ELEMENTS = 16 * 2**20
"""Elements after which a bucket on the host is closed: 64 MiB of fp32."""

Bucket = list[tuple[nn.Parameter, nn.Parameter]]
"""Weights on the device, on which their gradients are left, and their masters on the host."""


class MasterAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, its state in place from the start so that a checkpoint can fill it.

    Args:
        weights: what gradients are left on, each with its `pieces`.
        host_share: share of their elements whose masters and moments are on the host, as `on_host` chooses them. Other
            weights are their own masters.

    Attributes:
        masters: what is stepped and saved, in the order of `weights`: fp32 or wider, each with its `pieces`.
    """

    def __init__(self, weights: Sequence[nn.Parameter], config: OptimizerConfig, host_share: float = 0.0) -> None:
        away = on_host(weights, host_share)
        self.masters = [_host_copy(w) if there else w for w, there in zip(weights, away, strict=True)]
        pairs = list(zip(weights, self.masters, strict=True))
        self._buckets = list(_buckets([pair for pair, there in zip(pairs, away, strict=True) if there]))
        here = [master for master, there in zip(self.masters, away, strict=True) if not there]
        steps = [here, *([master for _, master in bucket] for bucket in self._buckets)]
        super().__init__(
            [group for masters in steps for group in _groups(masters, config)],
            lr=config.lr or 0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for master in self.masters:
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        device = weights[0].device if self._buckets else torch.device("cpu")
        self._to_host, self._to_device = copier(device), copier(device)  # one for each direction

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every master by its weight's gradient, and leave the new values on the weights."""
        arriving, leaving = self._fetched(0), []
        self._step(0)
        for number, bucket in enumerate(self._buckets):
            here, arriving = arriving, self._fetched(number + 1)
            for (_, master), (gradient, mark) in zip(bucket, here, strict=True):
                self._to_host.settle(mark)
                master.grad = gradient
            self._step(number + 1)
            leaving += self._sent(bucket)
            for _, master in bucket:
                master.grad = None
        for mark in leaving:
            self._to_device.wait(mark)

    def publish(self) -> None:
        """Leave the masters' values on the weights, after something else than `step` has changed them."""
        for mark in [mark for bucket in self._buckets for mark in self._sent(bucket)]:
            self._to_device.wait(mark)

    def _step(self, number: int) -> None:
        """Step the masters on the device, number 0, or those of a bucket, from 1 on."""
        groups = self.param_groups
        self.param_groups = groups[2 * number : 2 * number + 2]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _fetched(self, number: int) -> list[tuple[Tensor, Any]]:
        """A bucket's gradients on their way to the host, and marks of when they are there."""
        coming = self._buckets[number] if number < len(self._buckets) else []
        gradients = [weight.grad for weight, _ in coming]
        assert all(gradient is not None for gradient in gradients), "a weight got no gradient"
        return [self._to_host.to_host(gradient) for gradient in gradients]  # type: ignore[arg-type]

    @torch.no_grad()
    def _sent(self, bucket: Bucket) -> list[Any]:
        """Marks of when a bucket's new values will be on the weights."""
        return [self._to_device.onto(weight, master) for weight, master in bucket]


def _groups(masters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    decaying = [p for p in masters if p.pieces[0].decay]  # type: ignore[attr-defined]
    others = [p for p in masters if not p.pieces[0].decay]  # type: ignore[attr-defined]
    return [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


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
    return 2 * max(BUCKET_ELEMENTS, largest) * (max(item, 4) + item)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps that changed the weights: fewer than the run's where some had no finite gradient."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which Adam's bias correction reads."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
