"""Matrix products, by the library that is fastest on the device."""

import platform

import torch
from torch import Tensor

# PyTorch takes MKL for fp32 on x86, which is up to twice as slow as oneDNN on processors of other makers. The operator
# is the one that PyTorch's own compiler emits for linear layers on CPUs.
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y^T without autograd, its sums rounded to `dtype` alone: [M, K], [N, K] -> [M, N].

    Args:
        dtype: that of x and y, or fp32.
    """
    if dtype == x.dtype:
        return linear(x, y)
    return wide_product(x, y, dtype)


def wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`product` of lower-precision tensors. A GPU's tensor cores sum in fp32 and write it as it is. No operator of
    PyTorch does so on a CPU: there the factors are cast, and oneDNN is told that their bf16 loses nothing, which takes
    about twice as long as a bf16 product."""
    if x.device.type == "cuda":
        return torch.mm(x, y.t(), out_dtype=dtype)
    if x.dtype != torch.bfloat16:
        return linear(x.to(dtype), y.to(dtype))
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        return torch.mm(x.to(dtype), y.to(dtype).t())
    finally:
        backend.fp32_precision = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without autograd: [..., K], [N, K], [N] -> [..., N].

    Transposed views are as good as contiguous tensors. The result is a tensor of its own, which may be changed in
    place under autograd (that of `F.linear` may be a view).
    """
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return torch.ops.aten._unsafe_view(y, shape)
    y = x.new_empty(shape)
    out = y.view(-1, weight.shape[0])
    torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    return y
