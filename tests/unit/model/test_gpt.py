"""The whole model: every architecture against the textbook, stages, recomputation, dropout, evaluation."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.model import Factory, GPTModel
from megasp.model.flops import parameter_count
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import SequenceAttention
from tests.unit.model.reference import LLAMA, batch, gradients, logits, loss, randomize, small, weights

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "llama tied": LLAMA | {"untie_embeddings_and_output_weights": False},
    "multi-query, biases": {"num_query_groups": 1, "untie_embeddings_and_output_weights": True},
    "qkv biases alone": LLAMA | {"add_qkv_bias": True},
    "qk norm, rotary": LLAMA | {"qk_layernorm": True},
    "qk norm, LayerNorm": {"qk_layernorm": True},
    "partial rotary, squared ReLU": {"position_embedding_type": "rope", "rotary_percent": 0.5, "squared_relu": True},
    "wide heads, no positions": {"kv_channels": 6, "position_embedding_type": "none"},
    "large epsilon, other base": LLAMA | {"norm_epsilon": 0.1, "rotary_base": 50.0},
}


def model(config: ModelConfig, dtype: torch.dtype = torch.float64, **options: Any) -> GPTModel:
    return randomize(GPTModel(config, factory=Factory(dtype=dtype), **options))


@pytest.mark.parametrize("backend", ["auto", "unfused"])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_textbook(name: str, backend: str) -> None:
    """Logits, loss and the gradient of every canonical tensor, fp64."""
    config = small(**VARIANTS[name])
    ours = model(config, attend=SequenceAttention(ParallelState.single(), backend=backend))
    tokens, labels, mask = batch(config)
    w = {key: value.clone().requires_grad_() for key, value in weights(ours).items()}
    torch.testing.assert_close(ours(tokens), logits(config, w, tokens))
    total = ours(tokens, labels, mask)
    expected = loss(config, w, tokens, labels, mask)
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for key, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, w[key].grad, msg=lambda text, key=key: f"{key}: {text}")
    assert gradients(ours).keys() == w.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name: str) -> None:
    config = small(**VARIANTS[name])
    assert sum(p.numel() for p in GPTModel(config).parameters()) == parameter_count(config)


def test_gradients_of_logits() -> None:
    config = small(**LLAMA)
    ours, tokens = model(config), batch(config)[0]
    w = {key: value.clone().requires_grad_() for key, value in weights(ours).items()}
    direction = torch.randn(2, 10, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours(tokens).backward(direction)
    logits(config, w, tokens).backward(direction)
    for key, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, w[key].grad)


def test_default_mask_counts_every_token() -> None:
    config = small()
    ours, (tokens, labels, _) = model(config), batch(config)
    torch.testing.assert_close(ours(tokens, labels), ours(tokens, labels, torch.ones(2, 10)))


def test_future_is_not_seen() -> None:
    config = small(**LLAMA)
    ours, tokens = model(config), batch(config)[0]
    changed = tokens.clone()
    changed[:, 6:] = 0
    assert torch.equal(ours(tokens)[:, :6], ours(changed)[:, :6])


def test_positions_are_taken_as_given() -> None:
    """Learned positions are looked up; rotary ones matter by their distance alone."""
    tokens = batch(small())[0]
    learned, rotary = model(small()), model(small(**LLAMA))
    moved = torch.arange(2, 12)
    assert not torch.allclose(learned(tokens), learned(tokens, positions=moved))
    torch.testing.assert_close(rotary(tokens), rotary(tokens, positions=moved), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(rotary(tokens), rotary(tokens, positions=2 * torch.arange(10)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stages_chain_to_the_whole(tied: bool) -> None:
    """Three stages, each with its own layers; every part starts from the weights that the whole has."""
    config = small(**LLAMA | {"num_layers": 3, "untie_embeddings_and_output_weights": not tied})
    factory = Factory(dtype=torch.float64)
    whole = GPTModel(config, factory=factory)
    stages = [
        GPTModel(config, layers=range(2), last=False, factory=factory),
        GPTModel(config, layers=range(2, 3), first=False, last=False, factory=factory),
        GPTModel(config, layers=range(0), first=False, factory=factory),
    ]
    tokens, labels, mask = batch(config)
    where = {"positions": torch.arange(10)}
    x = stages[1](stages[0](tokens, **where), **where)
    assert x.shape == (10, 2, 16)
    torch.testing.assert_close(stages[2](x, **where), whole(tokens))
    whole(tokens, labels, mask).backward()
    stages[2](x, labels, mask, **where).backward()
    expected = gradients(whole)
    for stage in stages:
        for name, gradient in gradients(stage).items():
            if name != "embedding.weight" or not tied:  # tied: each end has a share
                torch.testing.assert_close(gradient, expected[name])


def test_a_later_stage_knows_its_positions() -> None:
    """Its input is [S, B, D]: positions 0, 1, ... are counted along S."""
    config = small(**LLAMA)
    stage = GPTModel(config, first=False, factory=Factory(dtype=torch.float64))
    x = torch.randn(10, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(stage(x), stage(x, positions=torch.arange(10)))


def dropping(**values: Any) -> ModelConfig:
    return small(**LLAMA | {"hidden_dropout": 0.3, "attention_dropout": 0.2} | values)


def test_recompute_gives_the_same_gradients() -> None:
    """Bit for bit, with dropout on, and without keeping the activations of a block."""
    config, samples = dropping(), torch.tensor([7, 4])
    tokens, labels, mask = batch(config)
    found, kept = [], []
    for recompute in (Recompute(), Recompute("full")):
        ours, sizes = model(config, recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            total = ours(tokens, labels, mask, samples=samples)
        total.backward()
        found.append({"loss": total.detach()} | gradients(ours))
        kept.append(sum(sizes))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert kept[1] < 0.5 * kept[0]


def test_dropout_is_of_the_sample() -> None:
    """A sample drops the same alone and in a batch, whatever its row; another sample number, another mask."""
    config = dropping()
    ours = model(config)
    tokens, labels, mask = batch(config)

    def total(rows: list[int], samples: list[int]) -> Tensor:
        return ours(tokens[rows], labels[rows], mask[rows], samples=torch.tensor(samples))

    whole = total([0, 1], [7, 4])
    torch.testing.assert_close(whole, total([1, 0], [4, 7]))
    torch.testing.assert_close(whole, total([0], [7]) + total([1], [4]))
    assert not torch.allclose(whole, total([0, 1], [8, 4]))
    other = dataclasses.replace(Factory(dtype=torch.float64), seed=99)
    reseeded = randomize(GPTModel(config, factory=other))
    assert not torch.allclose(reseeded(tokens, labels, mask, samples=torch.tensor([7, 4])), whole)


@pytest.mark.parametrize("site", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_alone(site: str) -> None:
    config = small(**LLAMA | {site: 0.5})
    ours, plain = model(config), model(small(**LLAMA))
    tokens, labels, mask = batch(config)
    samples, expected = torch.tensor([0, 1]), plain(tokens, labels, mask)
    assert not torch.allclose(ours(tokens, labels, mask, samples=samples), expected)
    torch.testing.assert_close(ours(tokens, labels, mask), expected)
    torch.testing.assert_close(ours.eval()(tokens, labels, mask, samples=samples), expected)


def test_hidden_dropout_has_three_sites_a_layer_pair() -> None:
    """Embedding, attention branch, MLP branch, each with its own mask."""
    ours = model(dropping())
    keys = [ours.embedding_key, *(key for b in ours.layers for key in (b.attention_key, b.mlp_key, b.attention.key))]
    assert len(set(keys)) == 1 + 3 * 2


def test_bf16_is_close() -> None:
    config = small(**LLAMA)
    exact, rounded = (GPTModel(config, factory=Factory(dtype=d)) for d in (torch.float64, torch.bfloat16))
    tokens, labels, mask = batch(config)
    total = rounded(tokens, labels, mask)
    assert total.dtype == torch.float32, "the loss is summed in fp32"
    torch.testing.assert_close(total.double(), exact(tokens, labels, mask), rtol=2e-3, atol=0)
    total.backward()
    exact(tokens, labels, mask).backward()
    for name, gradient in gradients(rounded).items():
        expected = gradients(exact)[name]
        assert (gradient.double() - expected).norm() < 0.03 * expected.norm(), name


def test_tied_head_is_the_embedding() -> None:
    tied, untied = GPTModel(small()), GPTModel(small(untie_embeddings_and_output_weights=True))
    assert tied.head is tied.embedding and untied.head is not untied.embedding
    assert not torch.equal(untied.head.weight, untied.embedding.weight)  # type: ignore[union-attr]
