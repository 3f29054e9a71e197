"""Gradients over replicas on real ranks: accumulated and summed in fp32, reduced once, in the last microbatch; partial
gradients of tensor-parallel replicas; the global norm of a model that is split and replicated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.data_parallel import Replicas, clip_, global_norm, replicas, sum_partial_
from megasp.data_parallel import gradients as gradients_module
from megasp.model import ColumnParallelLinear, Factory, GPTModel, RowParallelLinear
from megasp.model.norm import Norm
from megasp.parallel_state import ParallelState
from megasp.parameters import placed
from tests.ranks import run_ranks
from tests.unit.model.reference import LLAMA, batch, gradients, small

D = 4


class Stack(nn.Module):
    """Six layers, so that small buckets hold some of them each."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        factory = Factory(dtype=dtype)
        self.layers = nn.ModuleList(ColumnParallelLinear(D, D, factory=factory, name=f"l{i}") for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def data(rank: int, microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + microbatch)
    return torch.randn(3, 2, D, generator=generator)


def gradient_of(rank: int, microbatch: int, dtype: torch.dtype) -> list[Tensor]:
    """One microbatch's gradients, in a fresh model."""
    model = Stack(dtype)
    model(data(rank, microbatch).to(dtype)).sum().backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def build(layout: str) -> ParallelState:
    return parallel_state.build(Layout.parse(layout), torch.device("cpu"))


def _accumulated(layout: str, dtype_name: str, bucket_elements: int, microbatches: int) -> None:
    replicas.BUCKET_ELEMENTS = bucket_elements
    dtype, axis = getattr(torch, dtype_name), build(layout).gradients
    model = Stack(dtype)
    held = Replicas(model, axis)
    assert len(held._buckets) == {1: 12, 2 * (D * D + D): 3}.get(bucket_elements, 1)
    for step in range(2):  # the second step overwrites what the first left
        axis.traffic.reset()
        for index in range(microbatches):
            held.begin_microbatch(last=index == microbatches - 1)
            assert axis.traffic.total_calls == 0, "reduced before the last microbatch"
            model(data(axis.rank, 10 * step + index).to(dtype)).sum().backward()
        assert axis.traffic.calls["all_reduce"] == len(held._buckets), "each bucket once, inside the last backward"
        held.finish()
        each = [gradient_of(r, 10 * step + i, dtype) for r in range(axis.size) for i in range(microbatches)]
        for number, master in enumerate(held.masters):
            wide = torch.promote_types(dtype, torch.float32)
            expected = sum(g[number].to(wide) for g in each)
            assert master.grad is not None and master.grad.dtype == wide
            torch.testing.assert_close(master.grad, expected, rtol=1e-5, atol=1e-6)
        bytes_ = sum(p.numel() for p in held.masters) * torch.finfo(wide).bits // 8
        assert axis.traffic.total_bytes == 2 * bytes_ * (axis.size - 1) // axis.size
        held.publish()
        assert all(master.grad is None for master in held.masters)


@pytest.mark.parametrize(
    ("layout", "dtype", "bucket"),
    [
        ("dp2", "float32", 1 << 20),
        ("dp2", "bfloat16", 1),
        ("dp2-u2", "bfloat16", 2 * (D * D + D)),
        ("dp2-dpo2-u2", "float32", 1),
    ],
)
def test_accumulated_and_summed(layout: str, dtype: str, bucket: int) -> None:
    run_ranks(_accumulated, Layout.parse(layout).world_size, layout, dtype, bucket, 3)


def _reduction_overlaps() -> list[int]:
    """All-reduces that were under way when the backward reached each layer, last layer first."""
    replicas.BUCKET_ELEMENTS = 1
    axis = build("dp2").gradients
    model = Stack(torch.float32)
    held = Replicas(model, axis)
    seen: list[int] = []
    for layer in model.layers:
        layer.register_full_backward_pre_hook(lambda *_: seen.append(axis.traffic.total_calls))
    held.begin_microbatch(last=True)
    model(data(axis.rank, 0).requires_grad_()).sum().backward()
    held.finish()
    return seen


def test_reduction_starts_inside_the_backward() -> None:
    for seen in run_ranks(_reduction_overlaps, 2):
        assert seen[0] == 0 and seen[-1] >= 8 and seen == sorted(seen), seen


# Tensor-parallel replicas


def _partial(sequence_parallel: bool) -> None:
    """A norm and a row-parallel bias whose ranks see different rows: gradients are summed where they are shares."""
    axis = build("tp4").tp
    factory = Factory(dtype=torch.float64)
    norm = Norm("LayerNorm", D, axis=axis, partial=sequence_parallel, factory=factory)
    linear = RowParallelLinear(8, D, axis, sequence_parallel=sequence_parallel, factory=factory)
    parameters = [*norm.parameters(), *linear.parameters()]
    for number, p in enumerate(parameters):
        p.grad = torch.full_like(p, 10.0 * number + axis.rank)
    sum_partial_(parameters, axis)
    for number, p in enumerate(parameters):
        shared = sequence_parallel and p is not linear.weight
        expected = 40.0 * number + 6 if shared else 10.0 * number + axis.rank
        assert p.grad is not None and (p.grad == expected).all(), (number, p.grad)
    assert axis.traffic.calls == ({"all_reduce": 1} if sequence_parallel else {}), "one all-reduce for all of them"


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_partial_gradients(sequence_parallel: bool) -> None:
    run_ranks(_partial, 4, sequence_parallel)


def _shared_heads() -> None:
    """Two kv heads on four ranks: each head's gradient is summed over its two ranks, and goes nowhere else."""
    axis = build("tp4").tp
    layer = ColumnParallelLinear(
        D, {"q": 16, "k": 8}, axis, bias=False, replicas={"k": 2}, factory=Factory(dtype=torch.float64)
    )
    other = torch.nn.Parameter(layer.weight.detach().clone())
    other.pieces = layer.weight.pieces  # type: ignore[attr-defined]
    for p in (layer.weight, other):
        p.grad = torch.full_like(p, 10.0**axis.rank)
    gradients_module.BUCKET_BYTES = 4 * D * 8  # one weight's k at a time
    sum_partial_([layer.weight, other], axis)
    for p in (layer.weight, other):
        assert p.grad is not None
        assert (p.grad[:4] == 10.0**axis.rank).all(), "q is this rank's alone"
        assert (p.grad[4:] == (11 if axis.rank < 2 else 1100)).all()
    assert (axis.traffic.calls, axis.traffic.bytes_sent) == ({"send": 2}, {"send": 2 * 4 * D * 8})


def test_partial_gradients_of_shared_heads() -> None:
    run_ranks(_shared_heads, 4)


def _model_gradients(layout: str, sequence_parallel: bool, options: dict[str, Any]) -> tuple[float, float]:
    """Every gradient of a whole model against one process, by canonical name; then the norm, and clipping."""
    config = small(**LLAMA | options)
    tokens, labels, mask = batch(config, length=8)
    whole = GPTModel(config, factory=Factory(dtype=torch.float64))
    whole(tokens, labels, mask).backward()
    expected = gradients(whole)
    state = build(layout)
    model = GPTModel(config, state, sequence_parallel=sequence_parallel, factory=Factory(dtype=torch.float64))
    held = Replicas(model, state.gradients)
    held.begin_microbatch(last=True)
    dp = slice(state.dp.rank, state.dp.rank + 1) if state.dp.size == 2 else slice(None)
    model(tokens[dp], labels[dp], mask[dp]).backward()
    held.finish()
    sum_partial_(held.masters, state.tp)
    for p in held.masters:
        for piece, box in placed(p.pieces):  # type: ignore[attr-defined]
            got, want = p.grad[box.slices], expected[piece.name][piece.box.slices]  # type: ignore[index]
            torch.testing.assert_close(got, want, msg=lambda text, name=piece.name: f"{name}: {text}")
    norm = global_norm(held.masters, state.model)
    assert norm.dtype == torch.float64
    clip_(held.masters, norm, 0.5)
    return norm.item(), global_norm(held.masters, state.model).item()


MODELS: list[tuple[str, bool, dict[str, Any]]] = [
    ("tp2", True, {}),
    ("tp4", True, {"num_query_groups": 1, "add_bias_linear": True}),
    ("tp4", True, {"num_query_groups": 2, "qk_layernorm": True, "normalization": "LayerNorm"}),
    ("tp4", False, {"num_query_groups": 2, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False}),
    ("tp2-dp2", True, {"position_embedding_type": "learned_absolute"}),
]


@pytest.mark.parametrize(("layout", "sequence_parallel", "options"), MODELS)
def test_models_gradients_norm_and_clipping(layout: str, sequence_parallel: bool, options: dict[str, Any]) -> None:
    """Each element of each canonical tensor counts once: kv heads on several ranks, norms on all, q on one."""
    config = small(**LLAMA | options)
    tokens, labels, mask = batch(config, length=8)
    whole = GPTModel(config, factory=Factory(dtype=torch.float64))
    whole(tokens, labels, mask).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None]).item()
    found = run_ranks(_model_gradients, Layout.parse(layout).world_size, layout, sequence_parallel, options)
    for norm, clipped in found:
        assert norm == pytest.approx(expected, rel=1e-10) and norm > 0.5
        assert clipped == pytest.approx(0.5, rel=1e-5)
