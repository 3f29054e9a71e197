"""The gradient's norm and clipping in one process, and the training state of a model that nobody else holds."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from megasp.data_parallel import Replicas, clip_, global_norm, replicas, sum_partial_
from megasp.model import ColumnParallelLinear, Factory
from megasp.parallel_state import Axis
from megasp.parameters import whole

ONE = Axis("pp_tp")


def parameter(grad: Tensor, replica: int = 0, replicas: int = 1) -> nn.Parameter:
    made = nn.Parameter(torch.zeros_like(grad))
    made.grad = grad
    made.pieces = (whole("w", tuple(grad.shape)).with_replicas(replica, replicas, False),)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm(dtype: torch.dtype) -> None:
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in
             enumerate([(5,), (3, 4), (2, 3, 4)])]  # fmt: skip
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm = global_norm([parameter(g) for g in grads], ONE)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(expected, rel=1e-6)


def test_norm_of_a_large_tensor() -> None:
    """An embedding of 16 million equal elements: an fp32 running sum stops growing long before its end."""
    grad = torch.full((16384, 1024), 0.1)
    exact = float(grad[0, 0]) * math.sqrt(grad.numel())
    assert abs(global_norm([parameter(grad)], ONE).item() / exact - 1) < 1e-6
    naive = abs(grad.flatten().cumsum(0)[-1].item() / (float(grad[0, 0]) * grad.numel()) - 1)
    assert naive < 1 and abs(torch.linalg.vector_norm(grad).item() / exact - 1) > 1e-6, "this test shows nothing here"


def test_other_owners_pieces_do_not_count() -> None:
    mine, theirs = parameter(torch.tensor([3.0])), parameter(torch.tensor([4.0]), replica=1, replicas=2)
    assert global_norm([mine, theirs], ONE).item() == 3
    assert global_norm([theirs], ONE).item() == 0, "a rank may own nothing"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norm_of_what_is_not_finite(value: float) -> None:
    assert not torch.isfinite(global_norm([parameter(torch.tensor([1.0, value]))], ONE))


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (5.0, 5.0), (100.0, 50.0), (0.0, 50.0)])
def test_clip(limit: float, expected: float) -> None:
    """Down to the limit, direction kept; below it, and with 0, untouched."""
    parameters = [parameter(torch.tensor([30.0])), parameter(torch.tensor([[40.0]]))]
    norm = global_norm(parameters, ONE)
    clip_(parameters, norm, limit)
    assert global_norm(parameters, ONE).item() == pytest.approx(expected, rel=1e-5)
    assert parameters[1].grad.item() / parameters[0].grad.item() == pytest.approx(4 / 3)  # type: ignore[union-attr]
    if expected == 50:
        assert parameters[0].grad.item() == 30  # type: ignore[union-attr]


def test_clip_of_zero() -> None:
    parameters = [parameter(torch.zeros(3))]
    clip_(parameters, global_norm(parameters, ONE), 1.0)
    assert parameters[0].grad.tolist() == [0, 0, 0]  # type: ignore[union-attr]


def test_nothing_is_partial_on_one_rank() -> None:
    axis, held = Axis("tp"), parameter(torch.tensor([2.0]))
    sum_partial_([held], axis)
    assert held.grad.item() == 2 and axis.traffic.total_calls == 0  # type: ignore[union-attr]


# Replicas of one


def train(model: nn.Module, held: Replicas, microbatches: int) -> None:
    for index in range(microbatches):
        held.begin_microbatch(last=index == microbatches - 1)
        model(torch.full((1, 1, 2), 1.0 if index else 256.0).to(next(model.parameters()).dtype)).sum().backward()
    held.finish()


@pytest.fixture
def bf16() -> Iterator[tuple[nn.Module, Replicas]]:
    model = ColumnParallelLinear(2, 2, bias=False, factory=Factory(dtype=torch.bfloat16))
    yield model, Replicas(model, Axis("dp"))


def test_fp32_needs_no_buckets() -> None:
    model = ColumnParallelLinear(2, 2, bias=False)
    held = Replicas(model, Axis("dp"))
    assert held._buckets == [] and held.masters[0] is model.weight
    train(model, held, 5)
    assert held.masters[0].grad.flatten().tolist() == [260.0] * 4  # type: ignore[union-attr]
    held.publish()
    assert model.weight.grad is None


def test_bf16_accumulates_in_fp32(bf16: tuple[nn.Module, Replicas]) -> None:
    """256 + 1 + 1 + 1 + 1: a bf16 sum stays at 256, which the plain model shows."""
    model, held = bf16
    assert held.masters[0] is not model.weight and held.masters[0].dtype == torch.float32
    assert held.masters[0].pieces is model.weight.pieces  # type: ignore[attr-defined]
    train(model, held, 5)
    assert held.masters[0].grad.flatten().tolist() == [260.0] * 4  # type: ignore[union-attr]
    assert model.weight.grad is None, "the bf16 gradient is gone as soon as it is added"
    plain = ColumnParallelLinear(2, 2, bias=False, factory=Factory(dtype=torch.bfloat16))
    for index in range(5):
        plain(torch.full((1, 1, 2), 1.0 if index else 256.0).bfloat16()).sum().backward()
    assert plain.weight.grad is not None and plain.weight.grad.flatten().tolist() == [256.0] * 4


def test_masters_keep_small_updates(bf16: tuple[nn.Module, Replicas]) -> None:
    """Updates below the resolution of bf16 add up in the master, and reach the compute weights when they are due."""
    model, held = bf16
    with torch.no_grad():
        held.masters[0].fill_(1.0)
    held.publish()
    for _ in range(8):
        before = model.weight.clone()
        with torch.no_grad():
            held.masters[0] += 1e-3
        held.publish()
        assert torch.equal(model.weight, held.masters[0].bfloat16())
    assert not torch.equal(before, torch.ones_like(before)) and held.masters[0][0, 0].item() == pytest.approx(1.008)


def test_each_step_starts_anew(bf16: tuple[nn.Module, Replicas]) -> None:
    model, held = bf16
    for _ in range(2):
        train(model, held, 2)
        assert held.masters[0].grad.flatten().tolist() == [257.0] * 4  # type: ignore[union-attr]
        held.publish()


def test_buckets_partition_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which the backward makes gradients: last layers first."""
    monkeypatch.setattr(replicas, "BUCKET_ELEMENTS", 8)
    model = nn.Sequential(*(ColumnParallelLinear(2, n, factory=Factory(dtype=torch.bfloat16)) for n in (1, 2, 3, 1)))
    held = Replicas(model, Axis("dp"))
    sizes = [[master.numel() for master, _ in bucket.pairs] for bucket in held._buckets]
    assert sizes == [[1, 2, 3, 6], [2, 4, 1, 2]] and sum(map(sum, sizes)) == sum(p.numel() for p in model.parameters())


def test_finish_without_a_last_microbatch(bf16: tuple[nn.Module, Replicas]) -> None:
    """Forgetting `last=True` must not step with what lies in the buffer."""
    model, held = bf16
    held.begin_microbatch(last=False)
    model(torch.ones(1, 1, 2).bfloat16()).sum().backward()
    with pytest.raises(AssertionError, match="got no gradient"):
        held.finish()
