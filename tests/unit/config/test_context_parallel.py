"""Which split of the context-parallel ranks is meant or chosen, and what is refused with which way out."""

import dataclasses
from typing import Any

import pytest

from megasp.config.context_parallel import sent_bytes, split_context
from megasp.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megasp.config.validate import validate
from megasp.errors import ConfigError


def config(heads: int = 64, kv_heads: int = 8, seq_length: int = 131072, **parallel: Any) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=128 * heads,
            num_attention_heads=heads,
            num_query_groups=kv_heads,
            vocab_size=1000,
            position_embedding_type="rope",
            attention_dropout=0.0,
        ),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(mock_data=True),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(seq_length=seq_length, bf16=True, train_iters=1),
    )


def split(**options: Any) -> tuple[int, int, str]:
    chosen = split_context(config(**options))
    return chosen.ulysses, chosen.ring, chosen.ring_mode


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1, 1, "p2p")),
        ({"ulysses_size": 4}, (4, 1, "p2p")),
        ({"ring_size": 4}, (1, 4, "p2p")),
        ({"context_parallel_size": 8, "ulysses_size": 4}, (4, 2, "p2p")),
        ({"context_parallel_size": 8, "ring_size": 4, "cp_comm_type": "lightseq"}, (2, 4, "lightseq")),
        ({"context_parallel_size": 8, "cp_comm_type": "a2a"}, (8, 1, "p2p")),
        ({"context_parallel_size": 8, "cp_comm_type": "all_gather"}, (1, 8, "all_gather")),
        ({"context_parallel_size": 8}, (8, 1, "p2p")),
        ({"context_parallel_size": 8, "heads": 64, "kv_heads": 1}, (1, 8, "p2p")),
        ({"context_parallel_size": 8, "cp_comm_type": "a2a+p2p"}, (4, 2, "p2p")),
        ({"context_parallel_size": 16, "heads": 6, "kv_heads": 6}, (4, 4, "p2p")),
        ({"context_parallel_size": 8, "heads": 8, "kv_heads": 8, "tensor_model_parallel_size": 4}, (2, 4, "p2p")),
    ],
)
def test_split(options: dict[str, Any], expected: tuple[int, int, str]) -> None:
    assert split(**options) == expected


def test_the_reason_names_the_other_splits() -> None:
    reason = split_context(config(context_parallel_size=4)).reason
    assert reason.startswith("Ulysses 1 x ring 4 sends least") and "2 x 2: 1664.0, 4 x 1: 1728.0" in reason


def test_volumes_are_those_of_the_table() -> None:
    """GiB a layer and rank, 128k tokens, 64 heads of 128, bf16: the figures of the field with dk and dv counted twice
    as wide, since they travel in fp32."""
    both = config(), config(kv_heads=64)
    assert [round(sent_bytes(each, 8, 1) / 2**30, 2) for each in both] == [0.98, 1.75]
    assert [round(sent_bytes(each, 1, 8) / 2**30, 2) for each in both] == [round(0.4375 * 4, 2), 14.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context_parallel_size": 8, "ulysses_size": 3}, "--context-parallel-size 6"),
        ({"ring_size": 4, "cp_comm_type": "a2a"}, "a2a is Ulysses alone"),
        ({"ulysses_size": 4, "cp_comm_type": "lightseq"}, "how the ring's ranks exchange"),
        ({"context_parallel_size": 5, "cp_comm_type": "a2a+p2p"}, "use --cp-comm-type p2p"),
        ({"ulysses_size": 8, "ring_size": 2, "heads": 6, "kv_heads": 6, "seq_length": 96}, "use --ulysses-size 4"),
        ({"ring_size": 16, "seq_length": 100}, "use --seq-length 96 or 112"),
    ],
)
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(config(**options), 16)


def test_window_and_sinks() -> None:
    for changes, said in (({"attention_sinks": 4}, "give --window-size"), ({"window_size": -1}, "0 or more")):
        plain = config()
        with pytest.raises(ConfigError, match=said):
            validate(dataclasses.replace(plain, model=dataclasses.replace(plain.model, **changes)), 1)
