"""The rules of a configuration: pure, so that any configuration can be checked on any machine.

`validate(config, world_size)` raises one `ConfigError`: what was given, the rule, the nearest values that work.
"""

from megasp.config import activation_memory, host_offload, stages
from megasp.config.data_rules import check_data
from megasp.config.kernels import choose_kernel
from megasp.config.layout import Layout
from megasp.config.layout_rules import check_sharding, check_splits, layout_of, nearest
from megasp.config.precision_rules import check_fp8, check_precision
from megasp.config.profile import check_profile
from megasp.config.ranges import check_ranges
from megasp.config.rotary_scaling import check_rotary_scaling
from megasp.config.schedule_rules import check_schedule
from megasp.config.schema import Config
from megasp.errors import ConfigError


def validate(config: Config, world_size: int, device: str = "cpu") -> Layout:
    """Refuse a configuration that cannot run; return its layout.

    Args:
        config: everything that the user gave.
        world_size: number of ranks.
        device: "cpu" or "cuda", where it will run.
    """
    check_ranges(config)
    check_model(config)
    layout = layout_of(config, world_size)
    check_splits(config, layout)
    check_sharding(config)
    check_precision(config)
    stages.split(config)
    _batch(config, layout)
    _training(config, layout)
    _ignored(config)
    _kernels(config, device)
    activation_memory.check(config, layout, device)
    host_offload.check(config, device)
    check_profile(config.profile, config.trace_folder, world_size, device)
    check_fp8(config, layout, device)
    return layout


def check_model(config: Config) -> None:
    """Refuse a model whose sizes do not go together."""
    model = config.model
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    if model.kv_channels is None and model.hidden_size % heads:
        near = nearest(heads, lambda n: model.hidden_size % n == 0, model.hidden_size + 1)
        raise ConfigError(
            f"hidden-size {model.hidden_size} and num-attention-heads {heads}",
            "the heads must divide the hidden size (or --kv-channels says their size)",
            f"use {near} heads",
        )
    if heads % kv_heads:
        raise ConfigError(
            f"num-attention-heads {heads} and num-query-groups {kv_heads}",
            "every group must have equally many heads",
            f"use {nearest(kv_heads, lambda n: heads % n == 0, heads + 1)} groups",
        )
    if model.position_embedding_type == "rope" and int(model.head_dim * model.rotary_percent) < 2:
        raise ConfigError(
            f"head size {model.head_dim} and rotary-percent {model.rotary_percent}",
            "at least two channels must rotate",
            "use a larger head or share",
        )
    check_rotary_scaling(model)
    if model.swiglu and model.squared_relu:
        raise ConfigError("--swiglu and --squared-relu", "an MLP has one activation", "leave one out")
    if model.attention_sinks and model.window_size is None:
        raise ConfigError(
            f"attention-sinks {model.attention_sinks} and window-size {model.window_size}",
            "sinks are tokens seen beyond a window",
            "give --window-size, or leave --attention-sinks out",
        )
    longest = model.max_position_embeddings
    if (
        longest is not None
        and model.position_embedding_type == "learned_absolute"
        and longest < config.training.seq_length
    ):
        raise ConfigError(
            f"seq-length {config.training.seq_length} and max-position-embeddings {longest}",
            "learned positions must cover the sequence",
            f"use --max-position-embeddings {config.training.seq_length}",
        )


def _batch(config: Config, layout: Layout) -> None:
    training = config.training
    per_pass = training.micro_batch_size * layout.dp
    batch = config.global_batch_size(layout)
    if batch < 1 or batch % per_pass:
        raise ConfigError(
            f"global-batch-size {batch} with micro-batch-size {training.micro_batch_size} "
            f"on data-parallel size {layout.dp}",
            f"it must be a multiple of their product ({per_pass})",
            f"use --global-batch-size {nearest(max(1, batch), lambda n: n % per_pass == 0)}",
        )
    _rampup(training.rampup_batch_size, batch, per_pass)
    for size in config.batch_schedule(layout).sizes():
        config.pipeline.check_microbatches(size // per_pass)


def _rampup(rampup: tuple[int, ...], batch: int, per_pass: int) -> None:
    if not rampup:
        return
    got = f"--rampup-batch-size {' '.join(map(str, rampup))} with global-batch-size {batch}"
    fix = f"use for example {per_pass} {per_pass} {100 * batch}"
    if len(rampup) != 3 or min(rampup) < 1:
        raise ConfigError(got, "it is three positive numbers, START INCREMENT SAMPLES", fix)
    start, increment, _ = rampup
    if start >= batch or (batch - start) % increment:
        raise ConfigError(got, "whole increments must lead from START up to the global batch size", fix)
    if start % per_pass or increment % per_pass:
        rule = f"START and INCREMENT must be multiples of micro-batch-size x data-parallel size ({per_pass})"
        raise ConfigError(got, rule, fix)


def _training(config: Config, layout: Layout) -> None:
    training = config.training
    if (training.train_iters is None) == (training.train_samples is None):
        raise ConfigError(
            f"train-iters {training.train_iters} and train-samples {training.train_samples}",
            "exactly one of them says how long to train",
            "give --train-iters",
        )
    if config.train_steps(layout) < 1:
        raise ConfigError(f"{config.train_steps(layout)} steps", "there must be at least one", "train longer")
    check_schedule(config)
    check_data(config)
    if config.model.vocab_size is None and config.data.tokenizer_type is None:
        raise ConfigError(
            "no vocabulary", "the model needs its size", "give --tokenizer-type and --tokenizer-model, or --vocab-size"
        )
    if config.parallel.sequence_parallel and layout.tp == 1:
        raise ConfigError(
            "--sequence-parallel with tensor-model-parallel-size 1",
            "it splits the sequence over the tensor-parallel ranks",
            "leave it out, or use --ulysses-size to split the sequence by itself",
        )


NEEDED = {
    "finetune": ("load", None),
    "no_load_optim": ("load", None),
    "no_load_rng": ("load", None),
    "start_new_epoch": ("load", None),
    "load_strict": ("load", None),
    "no_save_optim": ("save", None),
    "async_save": ("save", None),
    "keep_last": ("save", None),
    "keep_every": ("save", None),
    "exit_on_save_error": ("save", None),
    "rotary_scaling_factor": ("rotary_scaling", None),
    "original_max_position_embeddings": ("rotary_scaling", None),
    "nproc_per_node": ("context_parallel_size", None),
    "tokenizer_model": ("tokenizer_type", None),
    "vocab_file": ("tokenizer_type", None),
    "merge_file": ("tokenizer_type", None),
    "decoupled_min_lr": ("decoupled_lr", None),
    "lr_wsd_decay_iters": ("lr_decay_style", "WSD"),
    "lr_wsd_decay_samples": ("lr_decay_style", "WSD"),
    "fp8_recipe": ("fp8_format", None),
    "fp8_backend": ("fp8_format", None),
    "first_last_layers_bf16": ("fp8_format", None),
    "num_layers_at_start_in_bf16": ("fp8_format", None),
    "num_layers_at_end_in_bf16": ("fp8_format", None),
}
"""Options that do nothing without another: its name, and its value where not any will do."""


def _ignored(config: Config) -> None:
    """Refuse options that would silently do nothing."""
    values = {name: value for group in vars(config).values() for name, value in vars(group).items()}
    for name, (needed, wanted) in NEEDED.items():
        there = values[needed]
        if values[name] and (there is None if wanted is None else there != wanted):
            option, other = (f"--{field.replace('_', '-')}" for field in (name, needed))
            other = f"{other} {wanted}" if wanted else other
            raise ConfigError(f"{option} without {other}", "it would do nothing", f"add {other}, or leave {option} out")


def _kernels(config: Config, device: str) -> None:
    dtype = config.training.compute_dtype
    backend, dropout = config.training.attention_backend, config.model.attention_dropout
    name, reasons = choose_kernel(backend, device, dtype, dropout, config.model.head_dim)
    if name is None:
        fix = "use --attention-dropout 0, or --attention-backend unfused" if dropout else "use --attention-backend auto"
        raise ConfigError(f"--attention-backend {backend}", reasons, fix)
    config.kernels.chosen(device, dtype)
