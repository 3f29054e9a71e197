"""The range of every number of a configuration, by the name of its field."""

import dataclasses
from dataclasses import dataclass

from megasp.config.schema import Config
from megasp.errors import ConfigError

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "lr")
"""Numbers without a default: 0 or None means that they were not given."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, `open` ends left out, and how to say so."""

    words: str
    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


SIZE = Range("positive", 1)
POSITIVE = Range("positive", 0, open_low=True)
COUNT = Range("0 or more", 0)
PROBABILITY = Range("a probability below 1", 0, 1, open_high=True)
DECAY = Range("at least 0 and below 1", 0, 1, open_high=True)
SHARE = Range("above 0 and at most 1", 0, 1, open_low=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            *REQUIRED[:-1], "ffn_hidden_size", "num_query_groups", "kv_channels", "max_position_embeddings",
            "vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "context_parallel_size", "nproc_per_node", "ulysses_size", "ulysses_head_chunks", "ring_size",
            "micro_batch_size", "global_batch_size",
            "train_iters", "train_samples", "eval_interval", "log_interval", "exit_interval", "save_interval",
            "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
            "profile_step_end", "keep_last", "keep_every", "original_max_position_embeddings",
            "num_distributed_optimizer_instances", "loss_scale_window", "hysteresis", "recompute_num_layers",
            "cpu_offloading_num_layers", "tiled_mlp", "sequence_chunks",
            "activation_tile_mb",
        ),
        SIZE,
    ),
    **dict.fromkeys(
        (
            "window_size", "attention_sinks", "num_workers", "eval_iters", "lr_warmup_iters", "lr_warmup_samples",
            "min_lr", "decoupled_min_lr", "lr_warmup_init", "weight_decay", "clip_grad", "init_method_std", "adam_eps",
            "norm_epsilon", "seed", "profile_step_start", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "lr", "decoupled_lr", "rotary_base", "distributed_timeout_minutes", "exit_duration_in_mins",
            "peak_tflops", "loss_scale", "initial_loss_scale", "min_loss_scale",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), PROBABILITY),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), DECAY),
    "lr_warmup_fraction": Range("between 0 and 1", 0, 1),
    "rotary_percent": SHARE,
    "optimizer_offload_fraction": SHARE,
    "rotary_scaling_factor": Range("at least 1", 1),
}  # fmt: skip


def check_ranges(config: Config) -> None:
    """Refuse the first number that is missing or out of its range."""
    for group in dataclasses.fields(config):
        values = getattr(config, group.name)
        for name, allowed in RANGES.items():
            value, flag = getattr(values, name, None), "--" + name.replace("_", "-")
            if name in REQUIRED and hasattr(values, name) and value == type(values)().__dict__[name]:
                raise ConfigError(
                    f"{flag} is not given",
                    f"it must be {allowed.words}",
                    f"give {flag} a value that is {allowed.words}",
                )
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"{flag} is {value}", f"it must be {allowed.words}", f"give {flag} a value that is {allowed.words}"
                )
