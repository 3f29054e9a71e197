"""What a run is made of: frozen dataclasses, one per concern, whose fields are the command-line flags.

Names and defaults are Megatron-LM's wherever it has the flag. Values that follow from others are properties.
"""

from dataclasses import dataclass, field

from megasp.config.batch_schedule import BatchSchedule
from megasp.config.flags import flag
from megasp.config.fp8 import Fp8Config
from megasp.config.host_offload import HostOffloadConfig
from megasp.config.kernels import KernelConfig
from megasp.config.layout import Layout
from megasp.config.loss_scale import LossScaleConfig
from megasp.config.model import ModelConfig
from megasp.config.optimizer import OptimizerConfig
from megasp.config.pipeline import SCHEDULES, PipelinePlan, chunks_of
from megasp.config.profile import ProfileConfig
from megasp.config.recompute import ActivationConfig
from megasp.config.tokenizer_types import TIKTOKEN_PATTERNS, TOKENIZER_TYPES

SHARDING_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
"""By ZeRO stage, in Megatron-LM's words."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout."""

    tensor_model_parallel_size: int = flag(1, "ranks that split each layer's weights")
    pipeline_model_parallel_size: int = flag(1, "ranks that split the layers into stages")
    pipeline_schedule: str | None = flag(
        None, "order of a step's work; 1f1b without it, interleaved with virtual stages", choices=SCHEDULES
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "stages (chunks) of each pipeline rank, for interleaved; zbv has 2"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(None, "the same by their number of layers")
    pipeline_model_parallel_layout: str | None = flag(
        None,
        'what each stage holds: E embedding, t layer, L head, | next stage, *n repeats: "Et*3|(tt|)*2L"; '
        "balanced by work without it",
    )
    decoder_first_pipeline_num_layers: int | None = flag(None, "layers of the first stage; the others are balanced")
    decoder_last_pipeline_num_layers: int | None = flag(None, "layers of the last stage; the others are balanced")
    context_parallel_size: int | None = flag(None, "ranks that share a sequence; ulysses-size x ring-size without it")
    cp_comm_type: str | None = flag(
        None,
        "how they exchange: a2a is Ulysses, p2p, all_gather and lightseq are ways of the ring's ranks, a2a+p2p is "
        "Ulysses x ring; with --context-parallel-size alone the split that sends least over slow links is chosen",
        choices=("a2a", "p2p", "all_gather", "lightseq", "a2a+p2p"),
    )
    nproc_per_node: int | None = flag(
        None,
        "ranks of a node, torchrun's without it: where the split of context-parallel ranks is left open, its choice "
        "counts bytes between nodes for more; nothing else depends on it",
    )
    ulysses_size: int | None = flag(
        None, "ranks of Ulysses sequence parallelism (all-to-all between sequence and heads)"
    )
    ulysses_head_chunks: int = flag(
        1, "groups of heads that Ulysses exchanges one after another, each while the one before is computed"
    )
    ring_size: int | None = flag(None, "ranks of ring attention (or of --cp-comm-type all_gather, lightseq)")
    sequence_parallel: bool = flag(
        False, "split norms, dropout and residuals along the sequence over the tensor-parallel ranks, too"
    )
    data_parallel_sharding_strategy: str = flag(
        "no_shard",
        "what data- and context-parallel ranks share out: nothing, optimizer states (ZeRO-1), gradients, too (ZeRO-2), "
        "and weights, too (ZeRO-3)",
        choices=SHARDING_STRATEGIES,
    )
    use_distributed_optimizer: bool = flag(False, "at least ZeRO-1: --data-parallel-sharding-strategy optim")
    num_distributed_optimizer_instances: int = flag(
        1, "hybrid sharding: so many replicas, each sharded over its part of the data-parallel ranks"
    )
    distributed_backend: str | None = flag(None, "nccl where there are GPUs, else gloo", choices=("nccl", "gloo"))
    distributed_timeout_minutes: float = flag(10.0, "how long a collective waits for the other ranks")

    @property
    def zero_stage(self) -> int:
        """What is shared out (arXiv 1910.02054): 1 optimizer states, 2 gradients, too, 3 weights, too; 0 nothing."""
        stage = SHARDING_STRATEGIES.index(self.data_parallel_sharding_strategy)
        return max(stage, int(self.use_distributed_optimizer))


PACKINGS = ("stream", "best-fit")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = flag(
        (), "prefixes of .bin/.idx pairs, or a weight before each of them", metavar="[WEIGHT] PREFIX"
    )
    train_data_path: tuple[str, ...] = flag(
        (), "as --data-path, all of it for training (instead of --data-path and --split)", metavar="[WEIGHT] PREFIX"
    )
    valid_data_path: tuple[str, ...] = flag((), "validation corpora, with --train-data-path", metavar="[WEIGHT] PREFIX")
    test_data_path: tuple[str, ...] = flag((), "test corpora, with --train-data-path", metavar="[WEIGHT] PREFIX")
    multiple_validation_sets: bool = flag(
        False, "a validation loss of its own, under its file's name, for each prefix of --valid-data-path"
    )
    data_order: str = flag(
        "keyed",
        "order of training samples; megatron is Megatron-LM's for the same seed, length, split and number of samples, "
        "to finish a run that began there",
        choices=("keyed", "megatron"),
    )
    document_packing: str = flag(
        "stream",
        "how documents fill samples: stream cuts the corpus where a sample ends; best-fit keeps documents whole where "
        "they fit, and pads",
        choices=PACKINGS,
    )
    start_new_epoch: bool = flag(
        False,
        "on resuming, begin a new epoch of a corpus that changed, or of all with another --seq-length (without it the "
        "first is refused, and the second finishes the epoch in pieces of the old length)",
    )
    split: str = flag("969,30,1", "shares of the corpus for training, validation and test")
    mock_data: bool = flag(False, "synthetic tokens instead of a corpus")
    tokenizer_type: str | None = flag(
        None, "kind of tokenizer; GPT2BPETokenizer without it where both its files are given", choices=TOKENIZER_TYPES
    )
    tokenizer_model: str | None = flag(
        None, "tokenizer.json or a directory that holds one, SentencePiece .model, tiktoken vocabulary", metavar="PATH"
    )
    vocab_file: str | None = flag(None, "GPT-2's vocab.json", metavar="PATH")
    merge_file: str | None = flag(None, "GPT-2's merges.txt", metavar="PATH")
    tiktoken_pattern: str = flag("v2", "how TikTokenizer splits text before the merges", choices=TIKTOKEN_PATTERNS)
    eod_mask_loss: bool = flag(False, "no loss where the input is the end-of-document token")
    reset_position_ids: bool = flag(False, "positions start anew with each document")
    reset_attention_mask: bool = flag(False, "documents of one sample do not see each other")
    eod_starts_document: bool = flag(
        False, "for the two flags before: a document begins after each end-of-document token, too, as in Megatron-LM"
    )
    num_workers: int = flag(2, "steps of data read ahead in the background; 0 reads in the training thread")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    seq_length: int = flag(0, "tokens of a sample (required, or by --model)")
    micro_batch_size: int = flag(1, "samples of one forward pass on a data-parallel rank")
    global_batch_size: int | None = flag(None, "samples of a step; micro-batch-size x data-parallel size without it")
    rampup_batch_size: tuple[int, ...] = flag(
        (),
        "begin with batches of START samples that grow by INCREMENT to the global batch size over SAMPLES samples",
        metavar="START INCREMENT SAMPLES",
    )
    train_iters: int | None = flag(None, "steps to train")
    train_samples: int | None = flag(None, "samples to train, instead of --train-iters")
    seed: int = flag(1234, "seed of weights, order and dropout")
    bf16: bool = flag(False, "compute in bfloat16; master weights, accumulation and reduction stay in fp32")
    fp16: bool = flag(False, "compute in float16 with a loss scale; the rest in fp32, as with --bf16")
    grad_reduce_in_bf16: bool = flag(
        False, "accumulate and reduce gradients in bfloat16: half the bytes, and a rounding for each microbatch"
    )
    weight_gradient_dtype: str = flag(
        "auto",
        "in which a microbatch's weight gradients are made, before they are added in fp32: fp32, rounded by none but "
        "kernels that write bf16 alone (fused norms, fp8 rowwise); or "
        "compute, rounded to the dtype of the weights; auto is fp32 on GPUs, whose products are in it as they are, and "
        "compute on CPUs, where they take twice as long",
        choices=("auto", "fp32", "compute"),
    )
    attention_backend: str = flag(
        "auto",
        "attention kernel; auto picks the best that this machine has, unfused (local) is the exact reference",
        choices=("auto", "flash", "fused", "flash-attn-2", "flash-attn-3", "unfused", "local"),
    )
    eval_interval: int = flag(1000, "steps between evaluations")
    eval_iters: int = flag(100, "steps of an evaluation; 0 switches it off")
    exit_interval: int | None = flag(None, "save and stop when the step is a multiple of it")
    exit_duration_in_mins: float | None = flag(None, "save and stop after so many minutes")

    @property
    def length(self) -> int:
        """Of the run: samples with --train-samples, else steps. The learning rate's schedule counts the same."""
        return self.train_samples or self.train_iters or 0

    def done(self, step: int, samples: int) -> int:
        """What of `length` is behind a run after `step` steps with `samples` samples."""
        return samples if self.train_samples else step

    @property
    def compute_dtype(self) -> str:
        """PyTorch's name of the dtype of activations and products."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    def widens_gradients(self, device: str) -> bool:
        """Whether weight gradients are made in a wider dtype than the weights', on "cpu" or "cuda"."""
        wanted = "fp32" if device == "cuda" else "compute"
        wanted = wanted if self.weight_gradient_dtype == "auto" else self.weight_gradient_dtype
        return wanted == "fp32" and (self.bf16 or self.fp16) and not self.grad_reduce_in_bf16


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = flag(None, "directory to write checkpoints to", metavar="DIR")
    save_interval: int | None = flag(None, "steps between checkpoints; at the end only without it")
    load: str | None = flag(
        None, "directory to resume from; without a checkpoint in it training starts anew", metavar="DIR"
    )
    async_save: bool = flag(
        False, "write checkpoints in the background, from a copy in host memory that is made beside the next step"
    )
    keep_last: int | None = flag(None, "checkpoints to keep, the newest ones; all without it")
    keep_every: int | None = flag(
        None, "keep those whose step is a multiple of it, too; alone, these and the newest", metavar="STEPS"
    )
    exit_on_save_error: bool = flag(
        False, "stop when a checkpoint cannot be written; without it training goes on, and tries again at the next"
    )
    load_strict: bool = flag(
        False, "refuse --load where the newest checkpoint is damaged or unfinished, instead of taking the one before"
    )
    load_hf: str | None = flag(
        None,
        "Hugging Face model to begin with, where --load has no checkpoint: its weights, and its architecture as "
        "defaults of the model's flags",
        metavar="DIR",
    )
    no_save_optim: bool = flag(False, "leave the optimizer's state out of checkpoints")
    no_load_optim: bool = flag(False, "resume with a fresh optimizer")
    no_load_rng: bool = flag(False, "accept another --seed than the checkpoint's")
    finetune: bool = flag(False, "load the weights alone: step, optimizer and data position start anew")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = flag(100, "steps between progress lines")
    tensorboard_dir: str | None = flag(None, "directory for TensorBoard events", metavar="DIR")
    metrics_file: str | None = flag(None, "JSON lines, one a step; SAVE/metrics.jsonl without it", metavar="FILE")
    log_comm: bool = flag(False, "print what each axis sent in a step, beside the closed forms")
    trace: str | None = flag(
        None,
        "time every pipeline action of the run's second step, and write them beside the simulator's (Chrome, Perfetto)",
        metavar="FILE",
    )
    peak_tflops: float | None = flag(None, "peak TFLOP/s of a device, for MFU; known GPUs are recognised")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss_scaling: LossScaleConfig = field(default_factory=LossScaleConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    offload: HostOffloadConfig = field(default_factory=HostOffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def trace_folder(self) -> str | None:
        """Where PyTorch's profiler writes."""
        return self.logging.tensorboard_dir or self.checkpoint.save

    @property
    def pipeline(self) -> PipelinePlan:
        """Schedule, ranks and chunks of the pipeline."""
        parallel = self.parallel
        ranks = parallel.pipeline_model_parallel_size
        chunks = chunks_of(
            ranks,
            self.model.num_layers,
            parallel.num_virtual_stages_per_pipeline_rank,
            parallel.num_layers_per_virtual_pipeline_stage,
            parallel.pipeline_model_parallel_layout,
        )
        return PipelinePlan.choose(parallel.pipeline_schedule, ranks, chunks)

    def global_batch_size(self, layout: Layout) -> int:
        """Samples of one step (after a ramp-up)."""
        return self.training.global_batch_size or self.training.micro_batch_size * layout.dp

    def batch_schedule(self, layout: Layout) -> BatchSchedule:
        """Samples of every step."""
        return BatchSchedule(self.global_batch_size(layout), *self.training.rampup_batch_size)

    def num_microbatches(self, layout: Layout) -> int:
        """Forward passes per step on each data-parallel rank (after a ramp-up)."""
        return self.global_batch_size(layout) // (self.training.micro_batch_size * layout.dp)

    def train_steps(self, layout: Layout, step: int = 0, samples: int = 0) -> int:
        """Steps of the whole run, of which `step` have trained `samples` samples."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        return step + self.batch_schedule(layout).steps(samples, self.training.train_samples or 0)
