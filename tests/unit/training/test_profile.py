"""--profile: which steps and ranks, by PyTorch's profiler and by CUDA's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megasp.cli import main
from megasp.config.load import from_values
from megasp.training import profile
from megasp.training.profile import profiler
from tests.ranks import run_ranks

RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    "--vocab-size 32 --attention-dropout 0 --mock-data --train-iters 6 --lr 1e-3 --eval-iters 0 --num-workers 0 "
    "--global-batch-size 2 --profile --use-pytorch-profiler"
)


def steps_in(folder: Path, rank: int) -> set[int]:
    """Of the only trace of a rank: its steps, counted from the start of the run."""
    (file,) = folder.glob(f"rank{rank}.*.pt.trace.json")
    names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)
    return {int(name.partition("#")[2]) for name in names if name.startswith("ProfilerStep#")}


def pretrain(flags: str) -> None:
    import torch
    import torch.distributed as dist

    from megasp import parallel_state
    from megasp.config.load import load, parser
    from megasp.config.validate import validate
    from megasp.training.build import build
    from megasp.training.pretrain import pretrain as train

    config = load(flags.split(), parser("pretrain", ""))[0]
    layout = validate(config, dist.get_world_size())
    train(build(config, parallel_state.build(layout, torch.device("cpu"))))


def test_traces_of_chosen_ranks_and_steps(tmp_path: Path) -> None:
    """Steps 3 and 4, which two steps are before; of one rank of two."""
    chosen = "--profile-step-start 2 --profile-step-end 4 --profile-ranks 1"
    run_ranks(pretrain, 2, f"{RUN} {chosen} --tensorboard-dir {tmp_path}")
    assert steps_in(tmp_path, 1) == {2, 3} and not list(tmp_path.glob("rank0.*"))


def test_a_run_that_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps that are left of those chosen, beside the checkpoints; none is said."""
    flags = ["pretrain", *f"{RUN} --profile-step-end 4 --save {tmp_path} --load {tmp_path}".split()]
    assert main([*flags, "--profile-step-start", "3", "--exit-interval", "3"]) == 0
    assert not list(tmp_path.glob("*.trace.json")), "it stopped before"
    assert main([*flags, "--profile-step-start", "1", "--exit-interval", "5"]) == 0
    assert steps_in(tmp_path, 0) == {0}, "step 4, the first one after resuming"
    assert main([*flags, "--profile-step-start", "3"]) == 0
    assert "nothing to profile: step 4 is over" in capsys.readouterr().out


def test_for_nsys(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's profiler is on before the first chosen step and off after the last, or when the run ends."""
    events: list[str] = []

    @contextmanager
    def switch(*_: Any, **__: Any) -> Iterator[None]:
        events.append("on")
        yield
        events.append("off")

    monkeypatch.setattr(profile.torch.cuda.profiler, "profile", switch)
    monkeypatch.setattr(profile, "emit_nvtx", switch)
    config = from_values({"profile": True, "profile_step_start": 2, "profile_step_end": 4})

    def run(rank: int, done: int, steps: int) -> list[str]:
        events.clear()
        with profiler(config, rank, done) as opened:
            for step in range(done, done + steps):
                events.append(str(step))
                opened.step()
        return events

    on, off = ["on", "on"], ["off", "off"]
    assert run(0, 0, 6) == ["0", "1", *on, "2", "3", *off, "4", "5"]
    assert run(0, 0, 3) == ["0", "1", *on, "2", *off]
    assert run(0, 3, 2) == [*on, "3", *off, "4"]
    assert run(0, 5, 2) == ["5", "6"] and run(1, 1, 3) == ["1", "2", "3"]
