"""fp8 products by Transformer Engine, which cannot run here: a small package stands in its place. It takes what the
package takes (its quantizers, storages and `general_gemm`, version 2.20.2), stores as it does, and computes in fp64."""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megasp.local_ranks import run_ranks
from megasp.model import ColumnParallelLinear, Factory, fp8
from megasp.model.fp8 import E4M3, E5M2, Fp8
from megasp.model.fp8_transformer_engine import TransformerEngineFp8
from megasp.model.products import FEATURES, GRADIENT, INPUT, ROWS, WEIGHT
from megasp.model.weight_gradients import WeightGradients, compute
from megasp.parallel_state import Axis
from tests.unit.model.test_saved import saved

S, B, D, F = 128, 1, 256, 384
RECIPES = ("tensorwise", "blockwise", "mxfp8")
DTYPES = {"kFloat8E4M3": E4M3, "kFloat8E5M2": E5M2}


@dataclass
class Storage:
    """What the package's storages have in common: bytes, and scales where its kernels look for them."""

    fp8_dtype: str
    quantizer: None
    fake_dtype: torch.dtype

    def __post_init__(self) -> None:
        assert self.fp8_dtype in DTYPES and self.quantizer is None and self.fake_dtype == torch.bfloat16
        for x in vars(self).values():
            assert not isinstance(x, Tensor) or x.is_contiguous()

    def wide(self, data: Tensor) -> Tensor:
        assert data.dtype == torch.uint8 and data.dim() == 2
        return data.view(DTYPES[self.fp8_dtype]).double()


@dataclass
class Float8TensorStorage(Storage):
    data: Tensor
    fp8_scale_inv: Tensor

    def by_rows(self) -> Tensor:
        assert self.fp8_scale_inv.shape == (1,) and self.fp8_scale_inv.dtype == torch.float32
        return self.wide(self.data) * self.fp8_scale_inv


@dataclass
class MXFP8TensorStorage(Storage):
    rowwise_data: Tensor | None
    rowwise_scale_inv: Tensor | None
    columnwise_data: Tensor | None
    columnwise_scale_inv: Tensor | None
    with_gemm_swizzled_scales: bool

    def of(self, data: Tensor | None, scale: Tensor | None, dim: int) -> Tensor:
        assert data is not None and scale is not None and scale.dtype == torch.uint8
        assert self.with_gemm_swizzled_scales is False
        assert scale.shape[dim] * 32 == data.shape[dim] and scale.shape[1 - dim] == data.shape[1 - dim]
        return self.wide(data) * scale.view(torch.float8_e8m0fnu).double().repeat_interleave(32, dim)

    def by_rows(self) -> Tensor:
        return self.of(self.rowwise_data, self.rowwise_scale_inv, 1)

    def by_columns(self) -> Tensor:
        return self.of(self.columnwise_data, self.columnwise_scale_inv, 0)


class Float8BlockwiseQTensorStorage(Storage):
    def __init__(  # type: ignore[no-untyped-def]
        self, rowwise_data, rowwise_scale_inv, columnwise_data, columnwise_scale_inv, fp8_dtype, quantizer,
        is_2D_scaled, *, fake_dtype,
    ) -> None:  # fmt: skip
        assert columnwise_data is None and columnwise_scale_inv is None
        self.data, self.scale, self.squares = rowwise_data, rowwise_scale_inv, is_2D_scaled
        super().__init__(fp8_dtype, quantizer, fake_dtype)
        self.__post_init__()

    def by_rows(self) -> Tensor:
        rows, columns = self.data.shape
        if self.squares:
            assert self.scale.shape == (rows // 128, -(-columns // 512) * 4)
            factors = self.scale[:, : columns // 128].repeat_interleave(128, 0)
        else:
            assert self.scale.shape == (columns // 128, rows)
            factors = self.scale.t()
        return self.wide(self.data) * factors.repeat_interleave(128, 1)


class Quantizer:
    """Casts a matrix as the package's quantizers do; how it stores what it casts is the subclass's."""

    def __init__(self, dtype: str, rowwise: bool, columnwise: bool) -> None:
        self.dtype, self.rowwise, self.columnwise, self.internal = DTYPES[dtype], rowwise, columnwise, False

    def __call__(self, x: Tensor) -> Any:
        assert x.dim() == 2 and x.is_contiguous() and self.internal and (self.rowwise or self.columnwise)
        stored = ModuleType("storage")
        vars(stored).update(self.store(x))
        return stored

    def store(self, x: Tensor) -> dict[str, Tensor | None]:
        raise NotImplementedError


def cast(x: Tensor, dtype: torch.dtype, rows: int, features: int) -> tuple[Tensor, Tensor]:
    """Bytes, and fp32 scales of blocks."""
    scale = fp8.power_of_two_scale(fp8.largest_values(x, rows, features), dtype)
    return fp8.quantised(x, scale, dtype).view(torch.uint8), scale


def general_gemm(a, b, *, out_dtype, layout, bias, use_split_accumulator):  # type: ignore[no-untyped-def]
    """B A^T in the words of row-major matrices."""
    assert use_split_accumulator is True and layout in ("TN", "NN", "NT")
    right = a.by_rows() if layout[0] == "T" else a.by_columns().t()
    left = b.by_columns().t() if layout[1] == "T" else b.by_rows()
    y = left @ right.t()
    return (y if bias is None else y + bias).to(out_dtype), None, None, None


def fake(hopper: bool) -> dict[str, ModuleType]:
    class Float8Quantizer(Quantizer):
        def __init__(self, scale, amax, fp8_dtype, *, rowwise, columnwise) -> None:  # type: ignore[no-untyped-def]
            assert rowwise, "the package does not cast to columns alone"
            assert scale.shape == amax.shape == (1,) and scale.dtype == amax.dtype == torch.float32
            self.scale = scale
            super().__init__(fp8_dtype, rowwise, columnwise)

        def store(self, x: Tensor) -> dict[str, Tensor | None]:
            data = fp8.quantised(x, self.scale.reciprocal()[0], self.dtype).view(torch.uint8)
            return {"_data": data, "_transpose": data.t().contiguous() if hopper and self.columnwise else None}

    class MXFP8Quantizer(Quantizer):
        def __init__(self, fp8_dtype, *, rowwise, columnwise) -> None:  # type: ignore[no-untyped-def]
            super().__init__(fp8_dtype, rowwise, columnwise)

        def store(self, x: Tensor) -> dict[str, Tensor | None]:
            rows, columns = cast(x, self.dtype, 1, 32), cast(x, self.dtype, 32, 1)
            bytes_ = [scale.to(torch.float8_e8m0fnu).view(torch.uint8) for _, scale in (rows, columns)]
            return {
                "_rowwise_data": rows[0] if self.rowwise else None, "_rowwise_scale_inv": bytes_[0],
                "_columnwise_data": columns[0] if self.columnwise else None, "_columnwise_scale_inv": bytes_[1],
            }  # fmt: skip

    class Float8BlockQuantizer(Quantizer):
        def __init__(self, fp8_dtype, *, rowwise, columnwise, force_pow_2_scales, block_scaling_dim) -> None:  # type: ignore[no-untyped-def]
            assert force_pow_2_scales is True
            assert rowwise or block_scaling_dim == 1, "squares are always cast to rows"
            self.squares = block_scaling_dim == 2
            super().__init__(fp8_dtype, rowwise, columnwise)

        def store(self, x: Tensor) -> dict[str, Tensor | None]:
            across = 128 if self.squares else 1
            rows, columns = cast(x, self.dtype, across, 128), cast(x, self.dtype, 128, across)
            scales = [rows[1].t(), columns[1]]
            if self.squares:
                scales = [functional.pad(scale, (0, -scale.shape[1] % 4)) for scale in (rows[1], columns[1].t())]
            return {
                "_rowwise_data": rows[0] if self.rowwise else None, "_rowwise_scale_inv": scales[0].contiguous(),
                "_columnwise_data": columns[0].t().contiguous() if self.columnwise else None,
                "_columnwise_scale_inv": scales[1].contiguous(),
            }  # fmt: skip

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions")
    package: dict[str, Any] = {name: ModuleType(name) for name in names}
    package[names[0]].pytorch, package[names[1]].cpp_extensions = package[names[1]], package[names[2]]
    package[names[2]].general_gemm = general_gemm
    dtypes: Any = ModuleType("DType")
    dtypes.kFloat8E4M3, dtypes.kFloat8E5M2 = DTYPES
    kinds = (
        Float8Quantizer, MXFP8Quantizer, Float8BlockQuantizer,
        Float8TensorStorage, MXFP8TensorStorage, Float8BlockwiseQTensorStorage,
    )  # fmt: skip
    vars(package[names[1]]).update({kind.__name__: kind for kind in kinds}, DType=dtypes)
    return package


def results(products: Fp8, axis: Axis | None = None, deferred: bool = False) -> list[Tensor]:
    """y, dx, dweight and dbias of a layer, of this rank's half of x where there are two."""
    axis = axis or Axis("tp")
    options: dict[str, Any] = {"axis": axis, "sequence_parallel": axis.size > 1, "products": products}
    layer = ColumnParallelLinear(D, F * axis.size, factory=Factory(dtype=torch.bfloat16), **options)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2 * S, B, size, generator=generator).bfloat16() for size in (D, F))
    own = 2 * S // axis.size  # 128 rows on each of two
    x = x[own * axis.rank : own * (axis.rank + 1)].requires_grad_()
    layer.weight.grad_dtype = torch.float32
    layer.weight_gradients = WeightGradients()
    layer.weight_gradients.defers = deferred
    y = layer(x)
    y.backward(dy)
    compute(layer.weight_gradients.take())
    assert layer.weight.grad is not None and layer.bias is not None and x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


def agree(recipe: str, gradient: torch.dtype, hopper: bool, **options: Any) -> None:
    given: Any = (recipe, gradient, options.pop("keeps_input", False))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fake(hopper).items():
            patch.setitem(sys.modules, name, module)
        got = results(TransformerEngineFp8(*given), **options)
    for ours, theirs in zip(results(Fp8(*given), **options), got, strict=True):
        assert theirs.dtype == ours.dtype and theirs.shape == ours.shape
        torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize(("recipe", "gradient"), list(itertools.product(RECIPES, (E5M2, E4M3))), ids=str)
@pytest.mark.parametrize("hopper", [True, False])
def test_as_pytorchs(recipe: str, gradient: torch.dtype, hopper: bool) -> None:
    """The same operands, so results differ by the order of sums alone."""
    agree(recipe, gradient, hopper)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hopper", [True, False])
def test_casts(recipe: str, hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are what `Fp8` makes of a tensor, wherever values and scales lie in memory."""
    for name, module in fake(hopper).items():
        monkeypatch.setitem(sys.modules, name, module)
    x = torch.randn(S, B, F, generator=torch.Generator().manual_seed(1)).bfloat16()
    for of, over in itertools.product((INPUT, WEIGHT, GRADIENT), ((FEATURES,), (ROWS,), (FEATURES, ROWS))):
        ours, theirs = (kind(recipe).cast(x, *over, of=of) for kind in (Fp8, TransformerEngineFp8))
        for want, got in zip(ours, theirs, strict=True):
            assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
            assert got.scale is not None and want.scale is not None and got.scale.dtype == want.scale.dtype
            assert got.scale.shape == want.scale.shape and torch.equal(got.scale.float(), want.scale.float())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("keeps_input", "deferred"), [(True, False), (False, True), (True, True)])
def test_kept_and_put_off(recipe: str, keeps_input: bool, deferred: bool) -> None:
    agree(recipe, E5M2, True, keeps_input=keeps_input, deferred=deferred)


def gathered() -> None:
    axis = Axis("tp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    for recipe, hopper, keeps_input in itertools.product(RECIPES, (True, False), (True, False)):
        agree(recipe, E5M2, hopper, axis=axis, keeps_input=keeps_input)


def test_gathered_over_the_sequence() -> None:
    run_ranks(gathered, 2)


def test_keeps_the_same() -> None:
    """What is saved has the sizes of PyTorch's products, by which the account counts it."""
    for recipe in RECIPES:
        sizes = []
        for kind in (Fp8, TransformerEngineFp8):
            with pytest.MonkeyPatch.context() as patch:
                for name, module in fake(True).items():
                    patch.setitem(sys.modules, name, module)
                layer = ColumnParallelLinear(D, F, factory=Factory(dtype=torch.bfloat16), products=kind(recipe))
                x = torch.ones(S, B, D, dtype=torch.bfloat16).requires_grad_()
                sizes.append([t.nbytes for t in saved(partial(layer, x))])
        assert sizes[0] == sizes[1], recipe
        part, theirs = (kind(recipe).footprint("layer", S * B, D, F, 2, 4) for kind in (Fp8, TransformerEngineFp8))
        assert part.kept == theirs.kept and sum(part.kept.values()) == pytest.approx(sum(sizes[1][:2]), abs=4)
