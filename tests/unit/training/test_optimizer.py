"""AdamW's kernels: packages' FusedAdam, which cannot run here, by a stand-in that takes what both take."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from megasp.config.kernels import OPTIMIZER_KERNELS, KernelConfig
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import OptimizerConfig
from megasp.errors import ConfigError
from megasp.parallel_state import ParallelState
from megasp.parameters import whole
from megasp.training.build import other_kernels
from megasp.training.optimizer import FUSED_ADAM, build_optimizer, set_learning_rate, set_step, steps_taken


class FusedAdam(torch.optim.Optimizer):
    """Steps are counted by group; state is made where there is none; fp32 alone; a group has parameters."""

    def __init__(
        self, params: Any, lr: float = 1e-3, *, bias_correction: bool = True, betas: Any = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        assert adam_w_mode and bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["params"][0].device  # noqa: B018 (apex reads it)
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for p in group["params"]:
                assert p.dtype == p.grad.dtype == torch.float32 and set(self.state[p]) == {"exp_avg", "exp_avg_sq"}
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - first)
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = (square / (1 - second**step)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / (1 - first**step) / root)


def masters(decays: tuple[bool, ...]) -> list[nn.Parameter]:
    made = []
    for number, decay in enumerate(decays):
        p = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(number)))
        p.pieces = (whole(f"p{number}", (3, 4)).with_facts(decay=decay),)  # type: ignore[attr-defined]
        made.append(p)
    return made


@pytest.mark.parametrize("kernel", FUSED_ADAM)
@pytest.mark.parametrize("decays", [(True, False, True), (True,)])
def test_packages(kernel: str, decays: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as PyTorch's after some steps, one skipped by a count that was set, as a resume sets it."""
    parts = FUSED_ADAM[kernel].split(".")
    for end in range(1, len(parts) + 1):
        module: Any = ModuleType(".".join(parts[:end]))
        module.FusedAdam = FusedAdam
        monkeypatch.setitem(sys.modules, module.__name__, module)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_beta2=0.95)
    ours, theirs = masters(decays), masters(decays)
    optimizers = build_optimizer(ours, config), build_optimizer(theirs, config, kernel)
    assert [steps_taken(o) for o in optimizers] == [0, 0]
    for step in range(4):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            for number, p in enumerate(parameters):
                p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + number))
            if step == 2:
                set_step(optimizer, 5)
            set_learning_rate(optimizer, 1e-2 / (step + 1))
            optimizer.step()
    assert [steps_taken(o) for o in optimizers] == [7, 7]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizers[0].state[p][kind], optimizers[1].state[q][kind])


def test_what_is_named_and_absent() -> None:
    state, device = ParallelState.single(), torch.device("cuda")
    assert state.layout == Layout()
    for option, name in (("norm_backend", "apex"), ("optimizer_backend", "transformer-engine")):
        config = from_values({option: name})
        with pytest.raises(ConfigError, match=rf"--{option.replace('_', '-')} {name}: .* is not installed here"):
            other_kernels(config, device, torch.bfloat16)
        with pytest.raises(ConfigError, match="it runs on cuda, not on cpu"):
            other_kernels(config, state.device, torch.bfloat16)
    assert other_kernels(from_values({}), device, torch.bfloat16) == ("fused", "torch")
    assert other_kernels(from_values({}), state.device, torch.float64) == ("unfused", "torch")


def test_table_and_registry_agree() -> None:
    assert set(OPTIMIZER_KERNELS) == {"torch", *FUSED_ADAM}
    assert KernelConfig().optimizer("cuda") == ("torch", "")
