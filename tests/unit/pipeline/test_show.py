"""`megasp schedule`."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megasp.cli import main


def test_drawing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--pipeline-model-parallel-size", "2", "--num-microbatches", "3", "--pipeline-schedule", "zb-h1", "--svg"]
    assert main(["schedule", *flags, str(tmp_path / "a.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rank 0  F0 F1 .. I0 W0 F2 I1 W1 I2 W2"
    assert lines[1] == "rank 1  .. F0 I0 F1 I1 W0 F2 I2 W1 W2"
    assert "makespan           10" in lines
    assert "peak activations   2, 2 (by rank; 1 is one microbatch through a rank's layers)" in lines
    assert "messages           6 a step" in lines
    titles = list(ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}title"))
    assert len(titles) == 18 + 2, "actions, and each rank's idle time"


def test_unequal_times_and_long_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--forward-time", "0.7", "--input-gradient-time", "1.1", "--message-time", "0.1"]) == 0
    assert "rank 3" in capsys.readouterr().out
    assert main(["schedule", "--num-microbatches", "200"]) == 0
    assert "too many for a terminal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pipeline-schedule interleaved", "add --num-virtual-stages-per-pipeline-rank 2"),
        ("--num-virtual-stages-per-pipeline-rank 2 --num-microbatches 6", "use 4 or 8 microbatches"),
        ("--num-virtual-stages-per-pipeline-rank 2 --num-microbatches 3", "use 4 microbatches"),
        ("--pipeline-schedule zbv --num-virtual-stages-per-pipeline-rank 3", "use 2, or leave it out"),
        ("--pipeline-schedule 1f1b --num-virtual-stages-per-pipeline-rank 2", "use --pipeline-schedule interleaved"),
        ("--pipeline-model-parallel-size 1 --pipeline-schedule zb-h1", "use --pipeline-model-parallel-size 2"),
        ("--weight-gradient-time 0", "it must be positive"),
    ],
)
def test_bad_input(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *flags.split()]) == 2
    assert said in capsys.readouterr().err
