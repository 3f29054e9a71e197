"""What other stacks keep, as the table says it, counted where their code runs on a CPU; the walk over a schedule."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

from benchmarks.stack_memory import (
    MEGATRON_SCORES,
    NANOTRON_LAYER,
    STACKS,
    TITAN_OPS,
    Piece,
    fullest,
    kept_bytes,
    widths,
)
from megasp.config.schema import ModelConfig
from megasp.dry_run import Tracker
from megasp.pipeline.schedules import schedule
from tests.ranks import run_ranks

TOKENS, SAMPLES, LENGTH = 128, 2, 64
GPT = ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=512, swiglu=False)
LLAMA = ModelConfig(
    num_layers=1, hidden_size=64, ffn_hidden_size=224, num_attention_heads=4, group_query_attention=True,
    num_query_groups=2, vocab_size=512, swiglu=True,
)  # fmt: skip


def storages(run: Callable[[], object], but: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd keeps of an operation, each once, but for those of some tensors."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        alive.append(x)
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(found.values()) - sum(found.get(x.untyped_storage().data_ptr(), 0) for x in but)


def megatron_core() -> tuple[int, float]:
    """Bytes that its layer of its own operations keeps, with dropout everywhere; and its fused loss of a logit."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    random.CudaRNGStatesTracker.fork = lambda self, *_: torch.random.fork_rng(devices=[])
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, hidden_dropout=0.1, attention_dropout=0.1, bf16=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=True, bias_dropout_fusion=True, masked_softmax_fusion=False,
    )  # fmt: skip
    layer = build_module(get_gpt_layer_local_spec(), config=config, layer_number=1).train().bfloat16()
    x = torch.randn(LENGTH, SAMPLES, 64, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    kept, labels = storages(lambda: layer(x, attention_mask=mask), [*layer.parameters(), mask]), torch.arange(64)
    world = dist.group.WORLD
    return kept, peak_per_logit(lambda logits: fused_vocab_parallel_cross_entropy(logits, labels, world).mean())


def test_megatron_layer_with_scores_and_fused_loss() -> None:
    pytest.importorskip("megatron.core")
    ((counted, logit),) = run_ranks(megatron_core, 1)
    assert logit == pytest.approx(STACKS["NeMo/Megatron-Core"].logits, rel=0.02)
    width = widths(GPT, 1, 1, LENGTH)
    # On a CPU the softmax is not fused and so in fp32, the mask of what is dropped of it in bf16, statistics in bf16.
    here = (4 - 2) * width["scores"] + (2 - 1) * width["scores"] + (8 - 16) * width["row"]
    assert counted == TOKENS * (kept_bytes(MEGATRON_SCORES, width) + here)


def test_korthikanti() -> None:
    width = widths(GPT, 1, 1, LENGTH)
    assert kept_bytes(MEGATRON_SCORES, width) - 16 == 64 * (34 + 5 * 4 * LENGTH / 64)


def test_selective_checkpoint_of_torchtitan() -> None:
    """Its rule on transformers' layer, whose products come in the same order."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64, intermediate_size=224, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).bfloat16()
    x = torch.randn(SAMPLES, LENGTH, 64, dtype=torch.bfloat16, requires_grad=True)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    products = 0

    def policy(_: object, operation: object, *args: object, **kwargs: object) -> checkpoint.CheckpointPolicy:
        nonlocal products
        product = operation is torch.ops.aten.mm.default
        products += product
        attention = operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        keep = attention or (product and products % 2 == 1)
        return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    with Tracker() as tracker:
        for tensor in (x, *angles, *layer.parameters()):
            tracker.note(tensor.untyped_storage())
        before = tracker.live
        out = checkpoint.checkpoint(
            layer, x, position_embeddings=angles, use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        gc.collect()
        kept = tracker.live - before - out.untyped_storage().nbytes()
    assert products == 7
    # `x` is kept, too, and was there before; the layer's output is the next one's.
    assert kept == TOKENS * (kept_bytes(TITAN_OPS, widths(LLAMA, 1, 1, LENGTH)) - 2 * 64)


def test_eager_swiglu() -> None:
    """Two eager operations and the product after them: the MLP's lines of nanotron's table."""
    merged = torch.randn(TOKENS, 2 * 224, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 224, dtype=torch.bfloat16, requires_grad=True)

    def run() -> Tensor:
        gate, up = torch.split(merged * 1, 224, dim=-1)
        return F.linear(F.silu(gate) * up, weight)

    lines = [each for each in NANOTRON_LAYER if each.width in ("up", "ffn")]
    assert storages(run, [weight]) == TOKENS * kept_bytes(lines, widths(LLAMA, 1, 1, LENGTH))


class BesideCompiler(Tracker):
    """Counts where functions are compiled, too: those of megatron-core's fused loss are."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def peak_per_logit(loss: Callable[[Tensor], Tensor]) -> float:
    """Most bytes of a logit at a time through loss and backward; `loss` gets the only reference to bf16 logits."""
    leaf = torch.randn(64, 2048, dtype=torch.bfloat16, requires_grad=True)
    with BesideCompiler() as tracker:
        tracker.note(leaf.untyped_storage())
        before = tracker.live
        loss(leaf * 1).backward()
    return (tracker.peak - before) / leaf.numel()


def test_logits_of_eager_cross_entropy() -> None:
    labels = torch.zeros(64, dtype=torch.long)
    found = peak_per_logit(lambda logits: F.cross_entropy(logits.float(), labels))
    assert found == pytest.approx(STACKS["torchtitan"].logits, rel=0.02)


def parallel_loss() -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, labels = init_device_mesh("cpu", (1,)), torch.zeros(64, dtype=torch.long)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(DTensor.from_local(logits.float(), mesh, [Shard(1)]), labels)

    with loss_parallel():
        return peak_per_logit(loss)


def test_logits_of_torchs_parallel_loss() -> None:
    (found,) = run_ranks(parallel_loss, 1)
    assert found == pytest.approx(STACKS["torchtitan, loss parallel"].logits, rel=0.02)


def test_logits_of_a_compiled_loss() -> None:
    """It keeps the bf16 logits themselves; their gradient is as wide."""
    labels = torch.zeros(64, dtype=torch.long)
    logits = torch.randn(64, 2048, dtype=torch.bfloat16, requires_grad=True)
    loss = torch.compile(lambda x: F.cross_entropy(x.float(), labels), backend="aot_eager_decomp_partition")
    kept = storages(lambda: loss(logits), [])
    assert 2 * kept / logits.numel() == pytest.approx(STACKS["torchtitan, compiled loss"].logits, rel=0.02)


def test_fullest_moment() -> None:
    """Rank 0 of two: two microbatches are there when the first backward begins, with nothing made yet; later gradients
    grow while activations go."""
    row = schedule("1f1b", 2, 4).rows[0]
    layer = Piece(kept=10.0, working=3.0, elements=1.0)
    assert fullest(row, {0: [layer, layer]}, made=0) == 2 * 20 + 3
    assert fullest(row, {0: [layer, layer]}, made=8) == 2 * 20 + 3
    assert fullest(row, {0: [layer, layer]}, made=12) == 2 * 20 - 10 + 12 + 3
