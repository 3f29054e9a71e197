import numpy as np
import pytest

from megasp.data import SampleOrder


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_is_a_bijection_and_scalar_and_vectorised_agree(n):
    order = SampleOrder(n, seed=1234, name="code", epoch=3)
    image = order.many(np.arange(n))
    assert sorted(image) == list(range(n))
    assert [order(i) for i in range(n)] == image.tolist()


def test_agrees_with_itself_at_large_n():
    order = SampleOrder(3 * 10**11, seed=1, name="code", epoch=0)
    indices = np.random.default_rng(0).integers(0, order.n, 200)
    image = order.many(indices)
    assert [order(int(i)) for i in indices] == image.tolist()
    assert image.min() >= 0 and image.max() < order.n and len(set(image.tolist())) == len(set(indices.tolist()))


def test_every_part_of_the_key_matters():
    orders = [
        SampleOrder(1000, seed, name, epoch) for seed in (1, 11) for name in ("a", "b", "1,a") for epoch in (0, 1, 10)
    ]
    assert len({tuple(order.many(np.arange(1000))) for order in orders}) == len(orders)
    assert len({order.start(10**9) for order in orders}) == len(orders)


def test_order_is_frozen():
    """Checkpoints rely on it: a change of these numbers reorders every run in progress."""
    order = SampleOrder(1000, seed=1234, name="code", epoch=0)
    assert [order(i) for i in range(8)] == [54, 903, 35, 166, 433, 498, 259, 878]
    assert order.start(10**6) == 580679


@pytest.mark.parametrize("n", [5, 13, 64])
def test_is_uniform_over_keys(n):
    counts = np.bincount([SampleOrder(n, seed, "x", 0)(0) for seed in range(4000)], minlength=n)
    chi2 = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
    assert chi2 < 2.5 * (n - 1)
    starts = [SampleOrder(n, seed, "x", 0).start(10) for seed in range(1000)]
    assert set(starts) == set(range(10))


def test_neighbours_are_scattered():
    image = SampleOrder(10**6, 5, "x", 0).many(np.arange(20000))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
