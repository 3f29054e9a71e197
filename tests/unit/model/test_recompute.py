"""Recompute changes what is kept, not what is computed; attention's forward runs once where that was asked for."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.model import GPTModel
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import SequenceAttention, kernels

CONFIG = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=64, attention_dropout=0.0, hidden_dropout=0.1
)


class Counting:
    """A kernel that counts its calls."""

    def __init__(self) -> None:
        self.inner, self.forwards, self.backwards = kernels.KERNELS["flash", "cpu"], 0, 0

    def forward(self, *arguments: Any) -> Any:
        self.forwards += 1
        return self.inner.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self.backwards += 1
        return self.inner.backward(*arguments)


def selective(*modules: str, **options: Any) -> Recompute:
    return Recompute("selective", modules=modules, **options)


CASES = [
    (Recompute(), 4),
    (Recompute("full"), 8),
    (Recompute("full", num_layers=3), 8),
    (Recompute("full", "block", 3), 7),
    (Recompute("full", "alternate", 2), 6),
    (Recompute("all-but-attention"), 4),
    (Recompute("all-but-attention", "block", 1), 4),
    (selective("core_attn"), 8),
    (selective("core_attn", method="block", num_layers=1), 5),
    (selective("mlp"), 4),
    (selective("layernorm"), 4),
    (selective("mlp_act"), 4),
    (selective("mlp", "layernorm"), 4),
    (selective("core_attn", "layernorm", "mlp_act"), 8),
]


@pytest.mark.parametrize(("recompute", "forwards"), CASES)
def test_same_gradients_and_attention_runs(
    recompute: Recompute, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout; and how often attention's kernel ran, forward."""

    def gradients(recompute: Recompute) -> list[Tensor]:
        attend = SequenceAttention(ParallelState.single(), backend="flash")
        model = GPTModel(dataclasses.replace(CONFIG), attend=attend, recompute=recompute)
        tokens = torch.arange(24).view(2, 12)
        loss = model(tokens, tokens + 1, samples=torch.tensor([3, 4]))
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    want = gradients(Recompute())
    counting = Counting()
    monkeypatch.setitem(kernels.KERNELS, ("flash", "cpu"), counting)
    got = gradients(recompute)
    assert (counting.forwards, counting.backwards) == (forwards, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
