"""What a configuration must not say: values that would crash later, change their meaning silently, or be ignored;
and values that the sentence of one rule proposes must pass all the others."""

import re
from typing import Any

import pytest

from megasp.config.validate import validate
from megasp.errors import ConfigError
from tests.unit.config.test_validate import config
from tests.unit.config.validate_cases import TP

WSD = {"lr_decay_style": "WSD"}

ILLEGAL: list[dict[str, Any]] = [
    # A layer, an index or a division fails later.
    {"num_query_groups": -2},
    {"ffn_hidden_size": 0},
    {"ffn_hidden_size": -64},
    {"kv_channels": -8},
    {"rotary_percent": 1.5},
    {"rotary_base": 0.0},
    {"rotary_scaling": "llama3", "rotary_scaling_factor": 0.5},
    {"vocab_size": 0},
    {"vocab_size": -5},
    {"norm_epsilon": -1.0},
    {"init_method_std": -0.02},
    {"num_workers": -1},
    {"eval_interval": 0},
    {"log_interval": 0},
    {"adam_beta1": 1.0},
    {"adam_beta2": -0.5},
    {"adam_eps": -1e-8},
    {"distributed_timeout_minutes": 0.0},
    WSD | {"lr_wsd_decay_iters": 0},
    WSD | {"lr_wsd_decay_iters": 11},  # longer than the run
    # Taken for "not given", or for another value.
    {"global_batch_size": 0},
    {"num_query_groups": 0},
    {"clip_grad": -1.0},
    {"exit_interval": 0},
    {"save_interval": -1},
    {"lr_warmup_iters": -3},
    {"lr_warmup_fraction": -0.1},
    {"lr_decay_iters": -5},
    {"ulysses_size": 2, "cp_comm_type": "p2p", "world": 2},  # p2p is ring
]


@pytest.mark.parametrize("given", ILLEGAL, ids=lambda given: "-".join(f"{k}={v}" for k, v in given.items()))
def test_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate(*config(given))
        pytest.fail(f"{given} passed validate")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tensor-model-parallel-size", {TP: 0}),
        ("ulysses-size", {"ulysses_size": 0}),
        ("context-parallel-size", {"context_parallel_size": 0}),
        ("micro-batch-size", {"micro_batch_size": 0}),
        ("lr", {"lr": 0.0}),
    ],
)
def test_zero_is_not_called_missing(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is 0"):
        validate(*config(given))


@pytest.mark.parametrize(
    "given",
    [
        {TP: 8, "ffn_hidden_size": 100},  # 5 and 10 divide 100, but not 8 heads
        {TP: 8, "num_attention_heads": 12, "hidden_size": 96},  # 6 divides 12 heads, but shares no kv heads with 4
        {TP: 8, "vocab_size": 500, "make_vocab_size_divisible_by": 1},
    ],
    ids=["ffn", "heads", "vocabulary"],
)
def test_proposed_sizes_pass_every_rule(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use a size of ") as caught:
        validate(*config(given | {"world": given[TP]}))
    for size in map(int, re.findall(r"\d+", caught.value.fix)):
        try:
            validate(*config(given | {TP: size, "world": size}))
        except ConfigError as error:
            pytest.fail(f"'{caught.value}' proposes {size}, but '{error}'")


def test_long_sequences_get_both_neighbours() -> None:
    """A sequence of millions of tokens has a legal length above it, too."""
    with pytest.raises(ConfigError, match="use --seq-length 2097152 or 2097156"):
        validate(*config({"seq_length": 2**21 + 2, "ulysses_size": 4, "world": 4}))
