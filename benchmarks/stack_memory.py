"""What other training stacks hold on a GPU, stated from their code: which tensors a layer keeps for its backward,
copies of weights and gradients, and how much of the logits exists at a time.

megasp's own account (`training/memory.py`) is of its lean Functions and is not used for what others keep. It stands in
for one thing alone: what a layer's backward works with beside what was kept, for the products there are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megasp.config.schema import ModelConfig
from megasp.pipeline.schedules import Action


@dataclass(frozen=True)
class Kept:
    """Tensors of a layer that stay until its backward: bytes of an element in all, and their width (`widths`)."""

    name: str
    bytes: int
    width: str


@dataclass(frozen=True)
class Stack:
    """A code base.

    Attributes:
        layers: what a layer keeps, by how it is recomputed.
        gradients: bytes of a parameter's gradient that stay through the step.
        made: of those that a backward makes and that go at its end.
        buckets: of a parameter's copy of the gradient that DistributedDataParallel reduces, where optimizer states are
            not sharded over several ranks.
        logits: bytes of a logit at a time, at most.
        gathered: buffers for a whole sequence of the residual stream that stay, where tensor parallelism splits it.
        queued: layers that a GPU may be behind when the forward has been launched, where collectives' inputs wait for
            it (`record_stream`): of each the outputs of both row-parallel products, not yet summed.
        keeps_output: whether a pipeline rank keeps what it has sent until the backward.
        working: what a layer's backward holds of the scores beside what was kept.
    """

    layers: dict[str, tuple[Kept, ...]]
    logits: int
    gradients: int
    made: int = 0
    buckets: int = 0
    gathered: int = 0
    queued: int = 0
    keeps_output: bool = False
    working: int = 0

    def states(self, elements: float, layer: float, table: float, shards: int, replicas: int, zero: int) -> float:
        """Bytes that stay of a rank's parameters.

        Args:
            elements: of all; `layer`: of one; `table`: of the embedding, and of the head.
            shards: ranks over which the optimizer is sharded from stage `zero` 1 on; `replicas`: that sum gradients.
        """
        if zero == 3:  # the layer that runs and the next are whole in two bytes, and what is beside the layers
            return elements * (self.gradients + OPTIMIZER) / shards + 2 * (2 * layer + 2 * table)
        buckets = self.buckets if replicas > 1 and not zero else 0
        return elements * (2 + self.gradients + buckets + OPTIMIZER / (shards if zero else 1))


OPTIMIZER = 12
"""Bytes of a parameter: the fp32 weight and Adam's two moments."""

NORMS = (Kept("inputs of both norms", 4, "stream"), Kept("outputs of both norms", 4, "stream"))

MEGATRON_SCORES = (
    *NORMS,
    Kept("mean and deviation of both norms", 16, "row"),
    Kept("q, k, v", 2, "qkv"),
    Kept("softmax", 2, "scores"),
    Kept("dropout's mask of it", 1, "scores"),
    Kept("softmax after dropout", 2, "scores"),
    Kept("attention output", 2, "queries"),
    Kept("masks of both residual branches", 2, "stream"),
    Kept("input of GeLU", 2, "ffn"),
    Kept("output of GeLU", 2, "ffn"),
)
"""Korthikanti et al. (arXiv 2205.05198, equation 1): sbh (34 + 5 as/h). tests/unit/planner/test_stack_memory.py counts
it on megatron-core's own layer."""

MEGATRON_TE = (
    *NORMS,
    Kept("mean and deviation of both norms", 16, "row"),
    Kept("fused q, k, v, of which v is a view", 2, "qkv"),
    Kept("q and k after rotary positions", 2, "qk"),
    Kept("attention output", 2, "queries"),
    Kept("softmax statistics", 4, "heads"),
    Kept("input of the activation", 2, "up"),
    Kept("output of the activation", 2, "ffn"),
)
"""Megatron-Core with Transformer Engine: `get_query_key_value_tensors` splits one tensor and `apply_rotary_pos_emb`
makes q and k anew (megatron/core/transformer/attention.py); LayerNormLinear saves its normed input, split over the
sequence (transformer_engine/pytorch/module/layernorm_linear.py)."""

NANOTRON_LAYER = (
    *NORMS,
    Kept("rotated q", 2, "queries"),
    Kept("k, v in one tensor", 4, "keys"),
    Kept("attention output", 2, "queries"),
    Kept("softmax statistics", 4, "heads"),
    Kept("gate and up", 2, "up"),
    Kept("SiLU of gate", 2, "ffn"),
    Kept("its product with up", 2, "ffn"),
)
"""nanotron's LlamaDecoderLayer (models/llama.py): GLUActivation is two eager operations, which keep their inputs;
column-parallel layers keep their share of the input and gather again (`tp_recompute_allgather`,
parallel/tensor_parallel/functional.py)."""

TITAN_FULL = (Kept("input", 2, "stream"),)
TITAN_OPS = (
    *TITAN_FULL,
    Kept("q as the product leaves it", 2, "queries"),
    Kept("v", 2, "keys"),
    Kept("attention output", 2, "queries"),
    Kept("softmax statistics", 4, "heads"),
    Kept("gate", 2, "ffn"),
    Kept("output of the MLP", 2, "stream"),
)
"""torchtitan's selective-op checkpoint (parallelisms/parallelize_llama.py): attention's output and every second matrix
product, the first, third, fifth and seventh of wq, wk, wv, wo, w1, w3, w2. A Float8Tensor's `mm` counts as one."""
TITAN = {"full": TITAN_FULL, "selective-op": TITAN_OPS}

STACKS = {
    # fp16 parameters, gradients in a buffer of their dtype (fp32 sums go with --bf16), to which fused products add.
    # The loss casts logits and subtracts the maximum in a new tensor (core/tensor_parallel/cross_entropy.py of 2023).
    "zero-bubble": Stack({"none": MEGATRON_SCORES}, logits=10, gradients=2, working=4),
    # NeMo's recipes reduce in bf16; the fused loss works in fp32 in place (core/fusions/fused_cross_entropy.py).
    "NeMo/Megatron-Core": Stack({"none": MEGATRON_TE}, logits=6, gradients=2),
    # fp32 sums in one buffer, to which a backward's bf16 gradients are added at its end
    # (optim/gradient_accumulator.py); without ZeRO DistributedDataParallel and its buckets beside (trainer.py,
    # `make_ddp`); logits cast to fp32 and the shifted copy that becomes the softmax; MemoryBuffer's "allgather" and
    # "allgather2"; activations sent are kept (parallel/pipeline_parallel/engine.py). Nothing of it sets
    # TORCH_NCCL_AVOID_RECORD_STREAMS, as torchtitan (`init_distributed`) and NVIDIA's scripts for NeMo do: what NCCL
    # reads is not used again before the GPU is there. CUDA queues some 1024 launches, a layer's forward has some 30.
    "nanotron": Stack(
        {"none": NANOTRON_LAYER}, logits=8, gradients=4, made=2, buckets=2, gathered=2, queued=34, keeps_output=True
    ),
    # fp32 shards and gradients (FSDP2); cross entropy in fp32: log-softmax, its gradient, the logits' gradient.
    "torchtitan": Stack(TITAN, logits=12, gradients=4),
    # With the vocabulary split: torch/distributed/tensor/parallel/loss.py adds, exponentiates and multiplies anew.
    "torchtitan, loss parallel": Stack(TITAN, logits=16, gradients=4),
    # Since 2025 the loss is compiled (components/loss.py): logits and their gradient in bf16.
    "torchtitan, compiled loss": Stack(TITAN, logits=4, gradients=4),
}


def widths(model: ModelConfig, tp: int, split: int, seq_length: int) -> dict[str, float]:
    """Elements of a token on a rank of `tp`, of which `split` share the residual stream."""
    queries, keys = model.num_attention_heads * model.head_dim / tp, model.kv_heads * model.head_dim / tp
    return {
        "row": 1 / split,
        "stream": model.hidden_size / split,
        "queries": queries,
        "keys": keys,
        "qk": queries + keys,
        "qkv": queries + 2 * keys,
        "heads": model.num_attention_heads / tp,
        "scores": model.num_attention_heads / tp * seq_length,
        "ffn": model.mlp_size / tp,
        "up": model.mlp_size / tp * (2 if model.swiglu else 1),
    }


def kept_bytes(layer: Sequence[Kept], width: dict[str, float]) -> float:
    """Of one layer and token."""
    return sum(each.bytes * width[each.width] for each in layer)


@dataclass(frozen=True)
class Piece:
    """Embedding, a layer or the head on a rank: bytes that it keeps and that it needs beside, and its parameters."""

    kept: float
    working: float
    elements: float


def fullest(row: Sequence[Action], stages: dict[int, Sequence[Piece]], made: int) -> float:
    """Most that a rank holds of activations, and of gradients of which a backward makes `made` bytes a parameter and
    lets them go, by its actions."""
    return max(_moments(row, stages, made))


def _moments(row: Sequence[Action], stages: dict[int, Sequence[Piece]], made: int) -> Iterator[float]:
    held = 0.0
    for action in row:
        gradients = 0.0
        for piece in stages[action.stage] if action.kind == "F" else reversed(stages[action.stage]):
            if action.kind == "F":
                held += piece.kept
            yield held + gradients + piece.working
            if action.kind == "B":
                held -= piece.kept
                gradients += made * piece.elements
                yield held + gradients
