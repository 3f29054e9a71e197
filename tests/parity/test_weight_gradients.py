"""Weight gradients of bf16 microbatches are added in fp32 without having been rounded: beside exact sums, in fp64, of
the same microbatches' products. The rounding that --weight-gradient-dtype compute brings is far above the tolerance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.data import Batch
from megasp.model import Factory, GPTModel, matmul
from megasp.parallel_state import ParallelState
from megasp.parameters import placed
from megasp.pipeline.executor import Pipeline
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import accumulate_gradients
from tests.parity.test_pipeline import config_of
from tests.ranks import run_ranks

BF16 = {"bf16": True, "num_layers": 4, "weight_gradient_dtype": "fp32", "num_query_groups": 2}
GPT2 = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "max_position_embeddings": 16,
    "swiglu": False, "add_bias_linear": True,
}  # fmt: skip


def batches_of(layout: str, flags: dict[str, Any], state: ParallelState) -> list[Batch]:
    training = build(config_of(layout, flags), state)
    with build_loader(training.config, state, training.shards, build_datasets(training.config).train) as loader:
        return list(loader.step())


def exact(flags: dict[str, Any]) -> dict[str, Tensor]:
    """Gradient of every canonical tensor: the same bf16 passes, but products and their sums in fp64."""
    config, state = config_of("tp1", flags), ParallelState.single()
    batches = batches_of("tp1", flags, state)
    factory = Factory(state.device, torch.bfloat16, config.training.seed)
    model = GPTModel(config.model, state, tiled_mlp=config.activations.tiled_mlp, factory=factory).train()
    for p in model.parameters():
        p.grad_dtype = torch.float64
    count = sum(float(batch.loss_mask.sum()) for batch in batches)
    Pipeline(config.pipeline, {0: model}, state, lambda last: None, torch.bfloat16).train(batches, count)
    gradients = {}
    for p in model.parameters():
        for piece, local in placed(p.pieces):
            gradients[piece.name] = p.grad[local.slices]
    return gradients


def _errors(layout: str, flags: dict[str, Any]) -> dict[str, float]:
    """Of this rank's boxes: name -> error relative to the norm of the box."""
    reference = exact(flags)
    state = parallel_state.build(Layout.parse(layout), torch.device("cpu"))
    training = build(config_of(layout, flags), state)
    with build_loader(training.config, state, training.shards, build_datasets(training.config).train) as loader:
        accumulate_gradients(training, loader.step())
    errors = {}
    for master in training.replicas.masters:
        assert master.grad is not None and master.grad.dtype == torch.float32
        for piece, local in placed(master.pieces):
            want = reference[piece.name][piece.box.slices]
            errors[piece.name] = ((master.grad[local.slices] - want).norm() / want.norm()).item()
    return errors


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("tp1", {}),  # the head is the embedding: both gradients of it
        ("tp1", GPT2),
        ("tp1", {"tiled_mlp": 2, "recompute_granularity": "full"}),
        ("dp2-zero1", {}),
        ("dp2-zero2", {"untie_embeddings_and_output_weights": True}),
        ("dp2-zero3", {"recompute_granularity": "full"}),
        ("pp2", {"pipeline_schedule": "zb-h1"}),
        ("pp2-dp2-zero3", {"pipeline_schedule": "zbv"}),
    ],
)
def test_sums_of_exact_products(layout: str, flags: dict[str, Any]) -> None:
    for errors in run_ranks(_errors, Layout.parse(layout).world_size, layout, BF16 | flags):
        assert max(errors.values()) < 1e-6, errors


def test_rounding_would_show() -> None:
    (errors,) = run_ranks(_errors, 1, "tp1", BF16 | {"weight_gradient_dtype": "compute"})
    assert min(errors.values()) > 1e-4, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_is_rounded_to_fp32_alone(dtype: torch.dtype) -> None:
    x, y = (torch.randn(n, 300, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (7, 5))
    wide = matmul.product(x, y, torch.float32)
    assert wide.dtype == torch.float32 and matmul.product(x, y, dtype).dtype == dtype
    torch.testing.assert_close(wide.double(), x.double() @ y.double().t(), rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "the flag is as it was"
