"""What each Function keeps for its backward, by shape and bytes: the account of activation memory rests on it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.schema import ModelConfig
from megasp.model import ColumnParallelLinear, Factory, GPTModel, RowParallelLinear
from megasp.model.activations import activation
from megasp.model.attention import Tokens
from megasp.model.dropout import TokenKeys, dropout
from megasp.model.layers import ONE_RANK
from megasp.model.loss import linear_cross_entropy
from megasp.model.norm import Norm
from megasp.model.rotary import cos_sin, rotate_
from megasp.sequence_parallel import attend

S, B, D = 6, 2, 8
ROPE = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, position_embedding_type="rope")


def saved(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a forward keeps, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = function()
    assert kept is not None
    return list(found.values())


def shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return sorted(tuple(x.shape) for x in tensors)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("linear", [ColumnParallelLinear, RowParallelLinear])
def test_linear_saves_input_and_weight(linear: type) -> None:
    given, module = x(S, B, D), linear(D, 12)
    assert {t.data_ptr() for t in saved(lambda: module(given))} == {given.data_ptr(), module.weight.data_ptr()}


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_saves_input_weight_and_statistics(kind: str, dtype: torch.dtype) -> None:
    norm, given = Norm(kind, D).to(dtype), x(S, B, D, dtype=dtype)
    kept = saved(lambda: norm(given))
    statistics = [t for t in kept if t.shape == (S, B, 1)]
    rest = {t.data_ptr() for t in kept if t.shape != (S, B, 1)}
    assert rest == {given.data_ptr(), *(p.data_ptr() for p in norm.parameters())}
    assert len(statistics) == (1 if kind == "RMSNorm" else 2)
    assert {t.dtype for t in statistics} == {torch.float32}, "statistics are fp32"


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(swiglu=True), ModelConfig(squared_relu=True)])
def test_activation_saves_its_input(config: ModelConfig) -> None:
    given = x(S, B, D)
    assert [t.data_ptr() for t in saved(lambda: activation(config)(given))] == [given.data_ptr()]


def test_rotary_saves_its_tables() -> None:
    given, table = x(S, B, 16), cos_sin(torch.arange(S), ROPE, torch.float32)
    kept = saved(lambda: rotate_(given * 1.0, 4, 4, table))
    assert {t.data_ptr() for t in kept if t.dim() == 4} == {t.data_ptr() for t in table}
    assert all(t.dim() == 4 for t in kept)


@pytest.mark.parametrize("backend", ["flash", "unfused"])
def test_attention_saves_q_k_v_out_lse(backend: str) -> None:
    """Not the probabilities, [B, N, S, S]."""
    kept = saved(lambda: attend(x(S, B, 4, D), x(S, B, 2, D), x(S, B, 2, D), backend=backend))
    assert shapes(kept) == sorted([(B, 4, S, D), (B, 2, S, D), (B, 2, S, D), (B, 4, S, D), (B, 4, S)])


def test_loss_saves_the_gradients() -> None:
    """Of hidden and weight; no logits. And nothing without a gradient to make."""
    labels, mask = torch.zeros(S, B, dtype=torch.int64), torch.ones(S, B)
    hidden, weight = x(S, B, D), x(50, D)
    kept = saved(lambda: linear_cross_entropy(hidden, weight, labels, mask, ONE_RANK))
    assert shapes(kept) == sorted([(S, B, D), (50, D)])
    assert {t.data_ptr() for t in kept}.isdisjoint({hidden.data_ptr(), weight.data_ptr()})
    with torch.no_grad():
        assert saved(lambda: linear_cross_entropy(hidden, weight, labels, mask, ONE_RANK)) == []


def test_dropout_saves_one_byte_an_element() -> None:
    keys = TokenKeys(torch.arange(B), torch.arange(S))
    (mask,) = saved(lambda: dropout(x(S, B, D), 0.5, 1, keys))
    assert (mask.dtype, mask.nbytes) == (torch.bool, S * B * D)


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_a_block_saves_no_more(dropped: float) -> None:
    """A Llama block, in elements of the compute dtype per token: x twice, both normed, q k v, attention's out, gate and
    up, their product; and beside these the statistics, lse, tables and masks."""
    config = ModelConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, swiglu=True,
        normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope", vocab_size=32,
        hidden_dropout=dropped, attention_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(config, factory=Factory(dtype=torch.bfloat16))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = Tokens(TokenKeys(torch.arange(B), torch.arange(S)), cos_sin(torch.arange(S), config, torch.bfloat16))
    given = x(S, B, 16, dtype=torch.bfloat16)
    kept = [t for t in saved(lambda: model.layers[0](given, tokens)) if t.untyped_storage().data_ptr() not in own]
    kept_bytes = sum(t.untyped_storage().nbytes() for t in kept)
    width = 2 * 16 + 2 * 16 + (4 + 2 + 2) * 4 + 4 * 4 + 2 * 40 + 40
    expected = 2 * S * B * width + 4 * S * B * (2 + 4) + 2 * 2 * S * 2 + (2 * S * B * 16 if dropped else 0)
    assert kept_bytes == expected, f"{kept_bytes - expected} bytes more: {shapes(kept)}"
