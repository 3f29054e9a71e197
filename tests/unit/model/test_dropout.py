"""Dropout masks: fair, independent, and a pure function of what they mask, so shards of a batch, of a sequence or of
the heads drop what the whole would."""

import pytest
import torch
from torch import Tensor

from megasp.model.dropout import TokenKeys, attention_bits, dropout, site_key, uniform_bits

KEY = site_key(1234, "layers.0.attention residual")


def keys(samples: list[int], positions: list[int]) -> TokenKeys:
    return TokenKeys(torch.tensor(samples), torch.tensor(positions))


def bits(samples: list[int], positions: list[int], features: int = 64, key: int = KEY) -> Tensor:
    return uniform_bits(key, keys(samples, positions), features)


def test_uniform() -> None:
    drawn = bits(list(range(16)), list(range(64)), 128)
    assert drawn.shape == (64, 16, 128) and drawn.min() >= 0 and drawn.max() < 2**31
    counts = torch.histc(drawn.double(), 64, 0, 2**31)
    expected = drawn.numel() / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 30 < chi_squared < 110, f"63 degrees of freedom, chi squared {chi_squared}"
    ones = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(31)])
    assert (ones - 0.5).abs().max() < 0.007, "some bit is not fair"


def test_neighbours_are_independent() -> None:
    """Correlation of the masks of adjacent samples, positions, features, sites and seeds."""
    drawn = bits(list(range(16)), list(range(64)), 128).double()
    drawn = (drawn - drawn.mean()) / drawn.std()
    for dim in range(3):
        first, second = drawn.narrow(dim, 0, drawn.shape[dim] - 1), drawn.narrow(dim, 1, drawn.shape[dim] - 1)
        assert abs((first * second).mean()) < 0.015, f"along dim {dim}"
    for site in ((1234, "layers.1.attention residual"), (1235, "layers.0.attention residual")):
        other = bits(list(range(16)), list(range(64)), 128, site_key(*site)).double()
        assert abs((drawn * (other - other.mean()) / other.std()).mean()) < 0.015, site


def test_shards_draw_their_part() -> None:
    """Batch order, microbatches and sequence shards change nothing; each name alone does."""
    whole = bits([3, 7, 5], [0, 1, 2, 3])
    assert torch.equal(bits([5, 3], [0, 1, 2, 3]), whole[:, [2, 0]])
    assert torch.equal(bits([3, 7, 5], [2, 3]), whole[2:])
    assert torch.equal(bits([3, 7, 5], [3, 0]), whole[[3, 0]])
    assert torch.equal(bits([3, 7, 5], [0, 1, 2, 3], 16), whole[..., :16])
    for other in (bits([4, 7, 5], [0, 1, 2, 3])[:, :1], bits([3, 7, 5], [4, 1, 2, 3])[:1]):
        assert (other != (whole[:, :1] if other.shape[1] == 1 else whole[:1])).float().mean() > 0.99


def test_far_names_wrap_without_trouble() -> None:
    """10^12 samples of 10^7 tokens: still different, still in range."""
    far = bits([10**12, 10**12 + 1], [10**7, 10**7 + 1])
    assert far.min() >= 0 and len(far.unique()) > 0.99 * far.numel()


def test_sites_and_seeds() -> None:
    names = {site_key(seed, site) for seed in range(4) for site in ("embedding", "layers.0.mlp residual", "layers.1")}
    assert len(names) == 12 and all(0 <= key < 2**62 for key in names)
    assert site_key(1, "a") == site_key(1, "a")


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_and_scale(probability: float) -> None:
    x = torch.ones(64, 16, 128, dtype=torch.float64)
    y = dropout(x, probability, KEY, keys(list(range(16)), list(range(64))))
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - probability)}
    assert abs((y == 0).double().mean() - probability) < 0.005
    rows = (y == 0).double().mean((1, 2)) - probability
    assert rows.abs().max() < 0.05, "some position drops more than others"


def test_gradient_has_the_same_mask() -> None:
    x = torch.randn(8, 2, 16, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3, KEY, keys([1, 2], list(range(8))))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx * x, y)


def test_off() -> None:
    x = torch.randn(2, 1, 4)
    assert dropout(x, 0.0, KEY, keys([0], [0, 1])) is x
    assert dropout(x, 0.5, KEY, None) is x


def test_no_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    dropout(torch.ones(4, 1, 8), 0.5, KEY, keys([0], [0, 1, 2, 3]))
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_bits() -> None:
    samples, at = torch.tensor([4, 9]), torch.arange(16)
    whole = attention_bits(KEY, samples, 0, 8, at, at)
    assert whole.shape == (2, 8, 16, 16) and whole.min() >= 0 and whole.max() < 2**31
    assert torch.equal(attention_bits(KEY, samples, 6, 2, at, at), whole[:, 6:]), "a rank of heads 6 and 7"
    assert torch.equal(attention_bits(KEY, samples[1:], 0, 8, at, at), whole[1:])
    assert torch.equal(attention_bits(KEY, samples, 0, 8, at[4:8], at[2:]), whole[:, :, 4:8, 2:]), "of any block"
    assert len(whole.unique()) > 0.999 * whole.numel(), "samples, heads, rows and columns are all told apart"
    assert (whole != whole.transpose(-1, -2)).float().mean() > 0.9, "query and key are not interchangeable"
    centred = whole.double() / 2**31 - 0.5
    assert abs(centred.mean()) < 0.02 and abs(centred.std() - 12**-0.5) < 0.01
