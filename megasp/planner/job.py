"""What the time model knows of a training run: shapes, layout, options and the software that runs it."""

from dataclasses import dataclass, replace
from functools import cached_property

from megasp.config.context_parallel import split_context
from megasp.config.kernels import choose_kernel
from megasp.config.layout import Layout
from megasp.config.pipeline import PipelinePlan
from megasp.config.recompute import ActivationConfig
from megasp.config.schema import Config, ModelConfig
from megasp.config.stages import Stage, split
from megasp.pipeline.schedules import placement

NORMS_SHARE, ACTIVATION_SHARE = 0.3, 0.35
"""Of a layer's element-wise traffic, that of the norms and that of the MLP's activation."""


@dataclass(frozen=True)
class Redone:
    """Shares of a layer's forward that its backward runs again, and how often it gathers its input for that."""

    core_attention: float = 0.0
    attention_linears: float = 0.0
    mlp: float = 0.0
    elementwise: float = 0.0
    gathers: float = 0.0

    @classmethod
    def of(cls, activations: ActivationConfig, layers: int = 1) -> "Redone":
        """What --recompute-granularity and its companions mean, in a stage of so many layers."""
        recompute = activations.recompute
        if activations.sequence_chunks > 1:  # attention's output stays, all else of a chunk runs again
            groups = float(recompute.num_layers > 1)  # whose layers all run forward again before that
            return cls(groups, 1.0 + groups, 1.0 + groups, 1.0 + groups)
        chosen = sum(len(group) for group, again in recompute.groups(layers) if again)
        share = chosen / max(1, layers)
        if recompute.granularity in ("full", "all-but-attention"):
            groups = sum(again for _, again in recompute.groups(layers)) * recompute.distributed
            return cls(share * (recompute.granularity == "full"), share, share, share, groups / max(1, layers))
        light = NORMS_SHARE * recompute.does("layernorm") + ACTIVATION_SHARE * recompute.does("mlp_act")
        return cls(share * recompute.does("core_attn"), 0.0, share * recompute.does("mlp"), share * light)


@dataclass(frozen=True)
class Software:
    """What a training stack does that the layout does not say.

    Attributes:
        attention: its kernel, by the names of --attention-backend; "unfused" and "fused softmax" write the scores out.
        fused: norms, rotary positions, activations and the loss each run as one kernel (hand-written or compiled);
            otherwise every operation of them reads and writes memory.
        overlap_tensor: in which directions tensor-parallel communication runs behind the GEMMs beside it.
        overlap_messages: whether what pipeline ranks send one another runs behind the next action.
        overlap_gradients: whether gradients are reduced behind the backward, and weights gathered behind the forward.
        whole_gradients: whether ranks that shard the optimizer alone sum all gradients (all-reduce), not their shard's.
        gradient_bytes: of an element of the gradients that data-parallel ranks reduce.
        partial_bytes: of an element of the ring's sums of gradients on their way.
        accumulate_bytes: read and written for a weight and a microbatch to add its gradient up, where the product does
            not do it.
        cast_bytes: with fp8, read and written for an element of an operand to cast it for both of its products.
        cast_weight_bytes: the same for an element of a weight and one direction of a microbatch; 0 where weights are
            cast once a step.
        gather_bytes: with fp8, of an element of an input that tensor-parallel ranks gather.
    """

    attention: str = "fused"
    fused: bool = False
    overlap_tensor: frozenset[str] = frozenset({"backward"})
    gradient_bytes: int = 4
    partial_bytes: int = 4
    accumulate_bytes: int = 0
    cast_bytes: int = 6
    cast_weight_bytes: int = 0
    gather_bytes: int = 2
    overlap_messages: bool = True
    overlap_gradients: bool = True
    whole_gradients: bool = False


MEGASP = Software(accumulate_bytes=14, cast_bytes=11, cast_weight_bytes=9, gather_bytes=1)
"""megasp on a GPU: eager element-wise operations; the backward's gathers and scatters beside GEMMs; weight gradients
that are written in fp32 (2 bytes more than in bf16) and added up in it (12); fp8 operands that are read for the largest
value, scaled, cast, and transposed, one after another, weights in each forward and backward, and gathered in fp8."""


@dataclass(frozen=True)
class Job:
    """One step of one run, as the time model sees it; `fp8_layers` is the share of the layers that have its precision
    where that is fp8, the others compute in bf16."""

    model: ModelConfig
    layout: Layout
    stages: tuple[Stage, ...]
    plan: PipelinePlan
    seq_length: int
    micro_batch: int
    microbatches: int
    sequence_parallel: bool = False
    ring_mode: str = "p2p"
    precision: str = "bf16"
    fp8_layers: float = 1.0
    zero: int = 0
    recompute: Redone = Redone()
    offload_activations: float = 0.0
    offload_attention: int = 1
    offload_optimizer: float = 0.0
    offload_weights: bool = False
    software: Software = MEGASP

    @classmethod
    def of(cls, config: Config, layout: Layout) -> "Job":
        """The job that a validated configuration describes."""
        stages = tuple(split(config))
        return cls(
            model=config.model,
            layout=layout,
            stages=stages,
            plan=config.pipeline,
            seq_length=config.training.seq_length,
            micro_batch=config.training.micro_batch_size,
            microbatches=config.num_microbatches(layout),
            sequence_parallel=config.parallel.sequence_parallel,
            ring_mode=split_context(config).ring_mode,
            precision="fp8" if config.fp8.fp8_format is not None else "bf16",
            fp8_layers=len(config.fp8.layers(config.model.num_layers)) / config.model.num_layers,
            zero=layout.zero,
            offload_activations=_offloaded(config, stages),
            offload_attention=config.activations.chunks_on_host,
            offload_optimizer=config.offload.moved_share,
            offload_weights=config.offload.cpu_offloading_weights,
            recompute=Redone.of(config.activations, max(len(stage.layers) for stage in stages)),
            software=replace(
                MEGASP,
                attention=_attention_kernel(config),
                gradient_bytes=2 if config.training.grad_reduce_in_bf16 else 4,
                accumulate_bytes=14 if config.training.widens_gradients("cuda") else 10,
            ),
        )

    @property
    def fp8_share(self) -> float:
        """Share of the layers whose linear layers compute in fp8."""
        return self.fp8_layers if self.precision == "fp8" else 0.0

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one rank."""
        return self.micro_batch * self.seq_length / self.layout.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all ranks."""
        return self.micro_batch * self.microbatches * self.layout.dp * self.seq_length

    @property
    def layer_parameters(self) -> float:
        """Parameters of a layer's matrices on one tensor-parallel rank; kv heads may be held several times."""
        model, tp = self.model, self.layout.tp
        kv = max(model.kv_heads / tp, 1) * model.head_dim
        queries = model.num_attention_heads / tp * model.head_dim
        mlp = (3 if model.swiglu else 2) * model.mlp_size / tp
        return model.hidden_size * (2 * queries + 2 * kv + mlp)

    @cached_property
    def loads(self) -> list[tuple[int, int, int]]:
        """(layers, embeddings, heads) of each pipeline rank."""
        owner = placement(self.plan.schedule, self.plan.ranks, self.plan.chunks)
        made = [[0, 0, 0] for _ in range(self.plan.ranks)]
        for stage in self.stages:
            own = made[owner[stage.number]]
            own[0] += len(stage.layers)
            own[1] += stage.first
            own[2] += stage.last
        return [(layers, first, last) for layers, first, last in made]

    def rank_parameters(self, rank: int) -> float:
        """Parameters of a pipeline rank on one tensor-parallel rank (norms and biases left out)."""
        layers, first, last = self.loads[rank]
        vocabulary = self.model.padded_vocab_size * self.model.hidden_size / self.layout.tp
        return layers * self.layer_parameters + (first + last) * vocabulary


def _attention_kernel(config: Config) -> str:
    """The kernel that runs on a GPU."""
    model, training = config.model, config.training
    dropout = model.attention_dropout
    name, _ = choose_kernel(training.attention_backend, "cuda", training.compute_dtype, dropout, model.head_dim)
    return name or "unfused"


def _offloaded(config: Config, stages: tuple[Stage, ...]) -> float:
    """Share of the layers whose kept activations go to the host."""
    chosen = sum(config.activations.offloaded(len(stage.layers)) for stage in stages)
    return chosen / config.model.num_layers
