"""Positions that restart with each document."""

import pytest
import torch

from megasp.config.schema import ModelConfig
from megasp.model import GPTModel


@pytest.mark.parametrize("kind", ["rope", "learned_absolute"])
def test_each_row_has_its_own_positions(kind):
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, position_embedding_type=kind,
        max_position_embeddings=16, attention_dropout=0.0, hidden_dropout=0.0, add_bias_linear=False,
    )  # fmt: skip
    model = GPTModel(config).double()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([torch.arange(12), torch.arange(12) % 5])
    together = model(tokens, position_ids=ids)
    for row in range(2):
        alone = model(tokens[row : row + 1], positions=ids[row])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-10, atol=1e-10)
    same = model(tokens, position_ids=torch.arange(12).expand(2, 12))
    torch.testing.assert_close(same, model(tokens), rtol=0, atol=0)
    assert not torch.allclose(together[1], model(tokens)[1])
