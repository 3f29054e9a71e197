"""Activations through the host, by plain copies: the same values bit for bit, and what is where when."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.host_copies import Copier, PlainCopier
from megasp.model import GPTModel, offload
from tests.unit.model.test_tiles import LLAMA


class Watched(PlainCopier):
    """Notes what is copied in which direction."""

    def __init__(self) -> None:
        self.away: list[int] = []
        self.back: list[int] = []

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        self.away.append(x.nbytes)
        return x.clone(), None

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        self.back.append(host.nbytes)
        return host.clone(), None


def gradients(config: ModelConfig, copies: Copier | None = None, **options: Any) -> list[Tensor]:
    model = GPTModel(dataclasses.replace(config, num_layers=4), offloaded_layers=4 if copies else 0, **options)
    model.copies = copies or PlainCopier()
    tokens = torch.arange(26).view(2, 13)
    loss = model(tokens, tokens + 1, samples=torch.tensor([3, 4]))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": Recompute("full")}, {"recompute": Recompute("selective", modules=("mlp",))}, {"tiled_mlp": 3}],
    ids=["plain", "full", "mlp", "tiled"],
)
def test_same_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.Offload.__init__, "__defaults__", (256,))
    copies = Watched()
    want, got = gradients(LLAMA, **options), gradients(LLAMA, copies, **options)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    # The last layer's never left the device; each of the others came back once, the last first.
    assert len(copies.away) >= 4 and sorted(copies.back) == sorted(copies.away[: len(copies.away) * 3 // 4])


def test_small_tensors_and_weights_stay() -> None:
    copies = Watched()
    gradients(LLAMA, copies)
    assert copies.away == [], "all of this model's activations are below the least size"
