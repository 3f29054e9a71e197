"""A checkpoint that real ranks wrote in one layout loads bit for bit in any other."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasp import parallel_state
from megasp.checkpoints import find_latest, load, read_manifest, save
from megasp.config.layout import Layout
from megasp.errors import CheckpointError
from tests.ranks import run_ranks
from tests.unit.checkpoints.cases import mismatches, shards

SAVED = ("tp4", "tp2-dp2", "dp4")
LOADED = ((1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (2, 3), (4, 5))
"""(tensor, data) sizes. Moments are cut by rows over data ranks, unevenly where the size does not divide."""


def _save_each(root: str) -> None:
    for name in SAVED:
        state = parallel_state.build(Layout.parse(name), torch.device("cpu"))
        held = shards(state.tp.size, state.tp.rank, state.dp.size, state.dp.rank)
        directory = save(Path(root, name), 10, held, state, {"layout": name})
        assert find_latest(Path(root, name)) == directory


def test_any_layout_to_any_other(tmp_path: Path) -> None:
    run_ranks(_save_each, 4, str(tmp_path))
    for name in SAVED:
        manifest = read_manifest(tmp_path / name / "step_00000010")
        assert manifest.layout.startswith("tp") and manifest.metadata == {"layout": name}
        assert manifest.files.keys() == {f"rank_{rank:05d}.safetensors" for rank in range(4)}
        for tp, dp in LOADED:
            for tp_rank, dp_rank in ((t, d) for t in range(tp) for d in range(dp)):
                held = shards(tp, tp_rank, dp, dp_rank, fill=False)
                load(tmp_path / name, held)
                assert list(mismatches(held)) == [], (name, tp, dp, tp_rank, dp_rank)


def _fail_on_rank_2(root: str) -> str:
    """One rank cannot write its file; all of them hear of it, nothing is left, and the next save works."""
    state = parallel_state.build(Layout.parse("tp4"), torch.device("cpu"))
    held = shards(4, state.tp.rank)
    first = save(Path(root), 1, held, state, {})
    if dist.get_rank() == 2:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    with pytest.raises(CheckpointError) as caught:
        save(Path(root), 2, held, state, {})
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    dist.barrier()
    assert sorted(path.name for path in Path(root).iterdir()) == ["latest", "step_00000001"]
    assert find_latest(Path(root)) == first
    dist.barrier()
    save(Path(root), 2, held, state, {})
    return str(caught.value)


def test_failure_of_one_rank(tmp_path: Path) -> None:
    messages = run_ranks(_fail_on_rank_2, 4, str(tmp_path))
    assert len(set(messages)) == 1
    assert "failed on rank 2: File too large" in messages[0], messages[0]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
