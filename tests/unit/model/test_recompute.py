"""Recompute changes what is kept, not what is computed; attention's forward runs once where that was asked for."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.model import GPTModel
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import SequenceAttention, kernels

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, attention_dropout=0.0, hidden_dropout=0.1
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


@pytest.mark.parametrize(("recompute", "forwards"), [(None, 2), ("full", 4), ("all-but-attention", 2)])
def test_attention_runs(recompute: str | None, forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(recompute: str | None) -> list[Tensor]:
        attend = SequenceAttention(ParallelState.single(), backend="flash")
        model = GPTModel(dataclasses.replace(CONFIG), attend=attend, recompute=recompute)
        tokens = torch.arange(24).view(2, 12)
        loss = model(tokens, tokens + 1, samples=torch.tensor([3, 4]))
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    want = gradients(None)
    counting = Counting()
    monkeypatch.setitem(kernels.KERNELS, ("flash", "cpu"), counting)
    got = gradients(recompute)
    assert (counting.forwards, counting.backwards) == (forwards, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
