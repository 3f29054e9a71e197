"""Which split of the context-parallel ranks is meant or chosen, and what is refused with which way out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megasp.config.context_parallel import BETWEEN_NODES, Sent, on_nodes, sent_bytes, split_context
from megasp.config.layout import Layout
from megasp.config.load import load, parser, to_yaml
from megasp.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megasp.config.validate import validate
from megasp.errors import ConfigError
from megasp.planner import hardware


def config(heads: int = 64, kv_heads: int = 8, seq_length: int = 131072, **parallel: Any) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=128 * heads,
            num_attention_heads=heads,
            group_query_attention=True,
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
        # The same ranks on nodes: Ulysses stays inside one where a ring of few kv heads can go between them.
        ({"context_parallel_size": 16, "kv_heads": 16}, (16, 1, "p2p")),
        ({"context_parallel_size": 16, "kv_heads": 16, "nproc_per_node": 16}, (16, 1, "p2p")),
        ({"context_parallel_size": 16, "kv_heads": 16, "nproc_per_node": 8}, (8, 2, "p2p")),
        ({"context_parallel_size": 16, "kv_heads": 16, "nproc_per_node": 4}, (16, 1, "p2p")),
        ({"context_parallel_size": 16, "kv_heads": 64, "nproc_per_node": 8}, (16, 1, "p2p")),
        ({"context_parallel_size": 8, "kv_heads": 2, "nproc_per_node": 4}, (4, 2, "p2p")),
        ({"context_parallel_size": 4, "tensor_model_parallel_size": 2, "nproc_per_node": 4}, (2, 2, "p2p")),
    ],
)
def test_split(options: dict[str, Any], expected: tuple[int, int, str]) -> None:
    assert split(**options) == expected


def test_the_reason_names_the_other_splits() -> None:
    reason = split_context(config(context_parallel_size=4)).reason
    assert reason.startswith("Ulysses 1 x ring 4 sends least") and "; 2 x 2: 1664.0; 4 x 1: 1728.0" in reason


def test_volumes_are_those_of_the_table() -> None:
    """GiB a layer and rank, 128k tokens, 64 heads of 128, bf16: the figures of the field with dk and dv counted twice
    as wide, since they travel in fp32."""
    both = config(), config(kv_heads=64)
    assert [round(sent_bytes(each, 8, 1).inside / 2**30, 2) for each in both] == [0.98, 1.75]
    assert [round(sent_bytes(each, 1, 8).inside / 2**30, 2) for each in both] == [round(0.4375 * 4, 2), 14.0]


@pytest.mark.parametrize("node", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize(("tp", "ulysses", "ring"), [(1, 4, 2), (2, 2, 3), (1, 3, 4), (4, 2, 2), (1, 1, 6), (3, 4, 1)])
def test_bytes_between_nodes_are_those_of_the_grid(tp: int, ulysses: int, ring: int, node: int) -> None:
    """An exchange's by the peers of the rank that has fewest beside it, a ring's by whether any hop leaves a node."""
    layout = Layout(ring=ring, ulysses=ulysses, tp=tp, dp_inner=node)

    def peers(axis: str, rank: int) -> list[int]:
        return [peer for peer in layout.group((axis,), rank) if peer != rank]

    ranks = range(layout.world_size)
    away = max(sum(p // node != rank // node for p in peers("ulysses", rank)) for rank in ranks)
    leaves = any(p // node != rank // node for rank in ranks for p in peers("ring", rank))
    given = config(24, 24, 12288, tensor_model_parallel_size=tp, nproc_per_node=node)
    alike = dataclasses.replace(given, parallel=dataclasses.replace(given.parallel, nproc_per_node=None))
    hops = sent_bytes(alike, ulysses, ring).inside - (exchanges := _exchanges(alike, ulysses, ring))
    found = sent_bytes(given, ulysses, ring)
    assert found.between == pytest.approx(exchanges * away / max(1, ulysses - 1) + hops * leaves)
    assert found.inside + found.between == pytest.approx(exchanges + hops)


def _exchanges(of: Config, ulysses: int, ring: int) -> float:
    """Bytes of Ulysses alone: a ring of one rank on as many tokens."""
    shorter = dataclasses.replace(
        of, training=dataclasses.replace(of.training, seq_length=of.training.seq_length // ring)
    )
    return sent_bytes(shorter, ulysses, 1).inside


def test_the_reason_says_what_goes_between_nodes() -> None:
    given = config(context_parallel_size=16, kv_heads=16, nproc_per_node=8)
    reason = split_context(given).reason
    assert reason.startswith("Ulysses 8 x ring 2 sends least, in MiB a layer, sample and rank: 560.0 + 256.0 between")
    assert "; 16 x 1: 280.0 + 320.0 between nodes; a byte between nodes of 8 ranks counts as 8" in reason
    assert "without --nproc-per-node" in split_context(config(context_parallel_size=16)).reason


def test_the_launchers_nodes_are_stored_where_they_matter(tmp_path: Path) -> None:
    given = config(context_parallel_size=16, kv_heads=16)
    stored = on_nodes(given, 8)
    assert stored.parallel.nproc_per_node == 8 and on_nodes(stored, 4) == stored
    assert on_nodes(given, None) == given
    for other in ({"ulysses_size": 4}, {"context_parallel_size": 4, "cp_comm_type": "p2p"}, {"ring_size": 2}):
        assert on_nodes(config(**other), 8) == config(**other)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(stored))
    again, *_ = load(["--config", str(file)], parser("test", ""))
    assert split_context(again) == split_context(stored) and split_context(again).ulysses == 8


def test_a_byte_between_nodes_counts_what_it_takes() -> None:
    """The planner's tables, whose GPUs have it between 7 and 14."""
    nodes = [hardware.load(name) for name in ("h100-80", "a100-80", "b200-180")]
    ratios = [node.gather_rate / node.network_rate for node in nodes]
    assert min(ratios) < BETWEEN_NODES < max(ratios)
    assert Sent(1.0, 2.0).cost == 1 + 2 * BETWEEN_NODES


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
