"""`linear` against PyTorch's, for every form that the layers use."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.model.matmul import linear


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 3, 16), (8, 16), (8,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_like_torch(dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = given(dtype)
    want = F.linear(x, weight, bias if has_bias else None)
    torch.testing.assert_close(linear(x, weight, bias if has_bias else None), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_transposed_views(dtype: torch.dtype) -> None:
    """The two products of a backward."""
    x, weight, _ = given(dtype)
    dy, rows = F.linear(x, weight), x.reshape(-1, 16)
    torch.testing.assert_close(linear(dy, weight.t()), dy @ weight)
    torch.testing.assert_close(linear(dy.reshape(-1, 8).t(), rows.t()), dy.reshape(-1, 8).t() @ rows)


def test_no_rows() -> None:
    x, weight, bias = given(torch.float32)
    assert linear(x[:0], weight, bias).shape == (0, 3, 8)


def test_its_result_may_be_changed_in_place_under_autograd() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return dy, None

    x, weight, _ = given(torch.float32)
    y = Doubled.apply(x.requires_grad_(), weight)  # three dims: of two even a product by F.linear is no view
    y.mul_(2)
    torch.testing.assert_close(y.detach(), 2 * F.linear(x, weight).detach())
