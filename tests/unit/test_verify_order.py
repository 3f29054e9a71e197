"""The order of communication: what layouts record agrees, and what would hang is told."""

import pytest
import torch.distributed as dist

from megasp import verify_order
from megasp.cli import main
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.verify import DEFAULTS, in_layout
from megasp.verify_order import Event, OrderError

SMALL = DEFAULTS | {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 32, "seq_length": 16, "global_batch_size": 4}
SCHEDULES = (
    {"pipeline_schedule": "gpipe"},
    {"pipeline_schedule": "1f1b", "sequence_parallel": True},
    {"num_virtual_stages_per_pipeline_rank": 2, "sequence_parallel": True},
    {"pipeline_schedule": "zb-h1", "untie_embeddings_and_output_weights": True},
    {"pipeline_schedule": "zbv", "recompute_granularity": "full", "sequence_parallel": True},
)


@pytest.mark.parametrize("flags", SCHEDULES, ids=lambda flags: "-".join(map(str, flags.values())))
@pytest.mark.parametrize("name", ["tp2-pp2", "pp2-u2-dp2"])
def test_schedules(name: str, flags: dict[str, object]) -> None:
    layout = Layout.parse(name)
    config = in_layout(from_values(SMALL | {"max_position_embeddings": 16} | flags), layout)
    assert f"all {layout.world_size} ranks" in verify_order.check(config, layout)
    assert not dist.is_initialized()


def test_sharded_weights() -> None:
    """Gathers and reductions of ZeRO-3 stand in one order with tensor parallelism's and the messages."""
    layout = Layout.parse("tp2-pp2-dp2-zero3")
    config = in_layout(from_values(SMALL | {"pipeline_schedule": "zbv", "sequence_parallel": True}), layout)
    assert "all 8 ranks" in verify_order.check(config, layout)


def test_some_ranks_are_whole_pipelines() -> None:
    chosen = verify_order.some_ranks(Layout.parse("tp8-pp8-u8"))
    assert len(chosen) == 4 * 8
    assert {rank % 64 for rank in chosen} == {0, 7, 56, 63}


def collective(group: str, size: int = 1) -> Event:
    return Event("allreduce_", group, (0, 1), "float32", size)


SEND, RECEIVE, WAIT = (
    Event(kind, "link", (0, 1), "float32", size) for kind, size in (("send", 9), ("recv_", 9), ("wait", 0))
)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[collective("a"), collective("b")], [collective("b"), collective("a")]], "wait for one another: rank 0: all"),
        ([[collective("a", 1)], [collective("a", 2)]], "do not do the same"),
        ([[collective("a")], []], "rank 0: allreduce_"),
        ([[collective("a"), SEND], [RECEIVE, WAIT, collective("a")]], "wait for one another"),
        ([[SEND], []], "1 sends and 0 receives"),
    ],
)
def test_what_would_hang(rows: list[list[Event]], said: str) -> None:
    with pytest.raises(OrderError, match=said):
        verify_order.replay(dict(enumerate(rows)))


def test_receive_ahead_is_fine() -> None:
    verify_order.replay({0: [collective("a"), SEND], 1: [RECEIVE, collective("a"), WAIT]})


def test_world_belongs_to_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--layout", "tp2", "--world", "4"]) == 2
    assert "add --collectives" in capsys.readouterr().err
