"""Megatron-LM's flags for GPT pretraining that megasp's dataclasses do not have, so that launch scripts keep running.

Three tables answer every one of them: `ALIASES` says the same in megasp's flags, `ALWAYS_ON` takes the flag and tells
the user why nothing changes, `REFUSED` gives the reason. Nothing that would change a result is taken and ignored.
The flags are those of Megatron-LM's `megatron/training/arguments.py` of 2025, and older ones that scripts still carry.
"""

from collections.abc import Sequence

from megasp.config.megatron_refused import REFUSED
from megasp.errors import ConfigError

__all__ = ["ALIASES", "ALWAYS_ON", "ONLY", "REFUSED", "translate"]

ALIASES: dict[str, tuple[str, ...]] = {
    "--use-rotary-position-embeddings": ("--position-embedding-type", "rope"),
    "--no-position-embedding": ("--position-embedding-type", "rope"),  # Megatron-LM takes it with rope alone
    "--use-rope-scaling": ("--rotary-scaling", "llama3"),
    "--rope-scaling-factor": ("--rotary-scaling-factor",),
    "--rotary-seq-len-interpolation-factor": ("--rotary-scaling", "linear", "--rotary-scaling-factor"),
    "--encoder-num-layers": ("--num-layers",),
    "--encoder-seq-length": ("--seq-length",),
    "--layernorm-epsilon": ("--norm-epsilon",),
    "--persistent-save-interval": ("--save-interval",),
    "--save-retain-interval": ("--keep-every",),
    "--use-torch-fsdp2": ("--data-parallel-sharding-strategy", "optim_grads_params"),
    "--fp8": ("--fp8-format",),
    "--fp8-hybrid": ("--fp8-format", "hybrid"),
    "--fp8-e4m3": ("--fp8-format", "e4m3"),
    "--no-gradient-accumulation-fusion": ("--weight-gradient-dtype", "compute"),
    "--recompute-activations": ("--recompute-granularity", "selective"),
}
"""flag -> megasp's flags for it. A value follows the last of them."""

_KERNELS = "kernels are chosen by what the machine has and compute the same function (--attention-backend names one)"
_FUSED = "it computes the same function; --compile makes one kernel of it"
_NORMS = "kernels are chosen by what the machine has (--norm-backend, --optimizer-backend, --fp8-backend name others)"
_MCORE = "there is one implementation of the model, and it is megasp's own"
_GARBAGE = "it tunes Megatron-LM's memory housekeeping; results do not depend on it"
_NO_INDEX = "no sample index is built or cached: the order of samples is computed"
_RESHARD = "every rank writes its own file, in parallel, and any layout loads it"
_METRICS = "it is always in the metrics file and in TensorBoard"
_CONSTANT = "it does not change in a run, and stands in the stored configuration"
_SCHEDULE = "the learning rate is a function of the step and of this run's flags"
_DENSE = "models are dense, which is what this value asks for"
_DEFAULT = "this value is what megasp does"
_TRANSFERS = "tensor-parallel transfers of the backward always overlap the weight-gradient GEMMs"
_LOSS = "the output layer and its loss are always one fused function"
_CENTERED = "x * (1 + w) with w from zero is x * w with w from one: not decayed, both take the same steps"
_TIMES = "the time of a step is the only one reported"

_ACCEPTED: tuple[tuple[int, str, str], ...] = (
    # values, what megasp does, flags
    # Communication
    (0, "gradient reduction always overlaps the backward", "--overlap-grad-reduce"),
    (0, _TRANSFERS, "--tp-comm-overlap"),
    (0, _TRANSFERS, "--no-async-tensor-model-parallel-allreduce --async-tensor-model-parallel-allreduce"),
    (
        0,
        "messages between pipeline stages always overlap computation",
        "--overlap-p2p-communication --overlap-p2p-communication-warmup-flush",
    ),
    (0, "there are no groups but those of --distributed-backend", "--disable-gloo-process-groups"),
    (1, "ranks come from the launcher's environment variables", "--local-rank"),
    (0, "weights of the next block are gathered behind the computation of this one", "--overlap-param-gather"),
    (0, "sharding is what --data-parallel-sharding-strategy says", "--use-megatron-fsdp --use-custom-fsdp"),
    # Precision
    (0, "they are in fp32 unless --grad-reduce-in-bf16 is given", "--accumulate-allreduce-grads-in-fp32"),
    (0, "the softmax of attention is always computed in fp32", "--attention-softmax-in-fp32"),
    (0, "the loss is always the mean over the global batch's target tokens", "--calculate-per-token-loss"),
    (
        0,
        "master weights and moments are fp32, which are its defaults, too",
        "--use-precision-aware-optimizer",
    ),
    # Offloading
    (0, "copies always overlap the step on the host, bucket by bucket", "--overlap-cpu-optimizer-d2h-h2d"),
    (0, "the step on the host is always PyTorch's fused AdamW", "--use-torch-optimizer-for-cpu-offload"),
    (0, "the loss scale of --fp16 is always in the metrics", "--no-log-loss-scale-to-tensorboard"),
    # Kernels and the model's implementation
    (0, "flash attention runs wherever it can", "--use-flash-attn --use-flash-attn-v2"),
    (1, f"{_MCORE}; {_NORMS}", "--transformer-impl"),
    (0, _MCORE, "--use-mcore-models"),
    # Megatron-LM's unfused kernel computes the other form, erf: up to 5e-4 away.
    (0, "GELU is always in its tanh form, that of GPT-2 and of Megatron-LM's fused kernel", "--no-bias-gelu-fusion"),
    (0, "GELU is always in its tanh form, which is OpenAI's", "--openai-gelu"),
    (0, _KERNELS, "--no-masked-softmax-fusion"),
    (0, _FUSED, "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --use-te-activation-func"),
    (0, _NORMS, "--no-persist-layer-norm"),
    (0, _CENTERED, "--apply-layernorm-1p"),
    (0, _LOSS, "--cross-entropy-loss-fusion"),
    (1, _LOSS, "--cross-entropy-fusion-impl"),
    (0, "every layout starts from the same weights, wherever they are generated", "--use-cpu-initialization"),
    (1, _DEFAULT, "--softmax-type --rope-type"),
    (1, _DENSE, "--expert-model-parallel-size --expert-tensor-parallel-size"),
    # Memory
    (0, _GARBAGE, "--no-clone-scatter-output-in-embedding --manual-gc --no-manual-gc-eval"),
    (1, _GARBAGE, "--manual-gc-interval --empty-unused-memory-level"),
    # Data
    (1, _NO_INDEX, "--data-cache-path --num-dataset-builder-threads --mid-level-dataset-surplus"),
    (0, "causal attention needs no mask tensor, so none is made", "--no-create-attention-mask-in-dataloader"),
    (0, "token files are read through memory maps of local paths", "--no-mmap-bin-files --disable-msc"),
    (1, "samples come in one keyed order, epoch after epoch", "--dataloader-type"),
    # Optimizer
    (1, _DEFAULT, "--weight-decay-incr-style"),
    (0, _SCHEDULE, "--override-opt-param-scheduler --override-opt_param-scheduler"),
    # Checkpoints
    (0, _RESHARD, "--use-dist-ckpt --ckpt-fully-parallel-save --ckpt-fully-parallel-load"),
    (0, _RESHARD, "--ckpt-assume-constant-structure --dist-ckpt-optim-fully-reshardable"),
    (1, _RESHARD, "--ckpt-format"),
    (0, "there is no generator state: randomness is a function of --seed and step", "--no-save-rng"),
    (0, "the tokenizer is the one that the flags name", "--no-use-tokenizer-model-from-checkpoint-args"),
    (0, "SIGTERM and SIGUSR1 always save and stop at the end of the step", "--exit-signal-handler"),
    (0, "--async-save writes in a thread of each rank, which lives as long as the run", "--use-persistent-ckpt-worker"),
    (1, "results are not computed twice for validation", "--rerun-mode"),
    # Logging
    (0, _METRICS, "--log-throughput --log-progress --log-memory-to-tensorboard"),
    (0, _METRICS, "--log-learning-rate-to-tensorboard --log-validation-ppl-to-tensorboard"),
    (0, _CONSTANT, "--log-batch-size-to-tensorboard --log-world-size-to-tensorboard"),
    (1, "TensorBoard gets every step", "--tensorboard-log-interval"),
    (1, "TensorBoard's events are written as they come", "--tensorboard-queue-size"),
    (1, _TIMES, "--timing-log-level --timing-log-option"),
    (0, "timing never waits for other ranks", "--no-barrier-with-level-1-timing"),
    (0, "nothing is sent to NVIDIA's one-logger", "--no-one-logger"),
)

ALWAYS_ON: dict[str, tuple[int, str]] = {flag: (n, says) for n, says, flags in _ACCEPTED for flag in flags.split()}
"""flag -> (values that it takes, one sentence on what megasp does anyway). What such a flag asks for always holds
here, or concerns only how Megatron-LM works inside."""

ONLY: dict[str, tuple[str, ...]] = {
    "--softmax-type": ("vanilla",),
    "--rope-type": ("rope",),
    "--expert-model-parallel-size": ("1",),
    "--expert-tensor-parallel-size": ("1",),
    "--dataloader-type": ("single",),
    "--weight-decay-incr-style": ("constant",),
    "--ckpt-format": ("torch_dist",),
    "--rerun-mode": ("disabled",),
    "--tensorboard-log-interval": ("1",),
    "--timing-log-level": ("0",),
}
"""flags of `ALWAYS_ON` whose sentence is true of these values alone; with another one they are refused."""


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A Megatron-LM command line in megasp's flags, and what to tell the user about the flags that changed nothing.

    Flags in none of the tables pass as they are.

    Example: `translate(["--use-flash-attn", "--encoder-seq-length", "128"])` returns `["--seq-length", "128"]` and
    `["--use-flash-attn: flash attention runs wherever it can"]`.

    Raises:
        ConfigError: a flag that is refused; one of `ALWAYS_ON` without its value, or with another than `ONLY` allows.
    """
    ours: list[str] = []
    said: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        flag, equals, value = token.partition("=")
        if flag in REFUSED:
            raise ConfigError(f"{flag} is not supported", REFUSED[flag], f"leave {flag} out")
        if flag in ALIASES:
            ours += [*ALIASES[flag], value] if equals else ALIASES[flag]
        elif flag in ALWAYS_ON:
            values, says = ALWAYS_ON[flag]
            if values and not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            _check_value(flag, value, values)
            said.setdefault(says, []).append(flag)
        else:
            ours.append(token)
    return ours, [f"{', '.join(flags)}: {says}" for says, flags in said.items()]


def _check_value(flag: str, value: str, values: int) -> None:
    if bool(value) != bool(values):
        rule = "it takes a value" if values else "it is a switch and takes no value"
        raise ConfigError(f"{flag} {value}".strip(), rule, "mend it, or leave it out: it changes nothing here")
    if flag in ONLY and value not in ONLY[flag]:
        rule = f"the value supported is {' or '.join(ONLY[flag])}"
        raise ConfigError(f"{flag} is {value}", rule, "use it, or leave the flag out")
