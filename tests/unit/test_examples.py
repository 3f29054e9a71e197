"""The launch scripts of examples/: what they hand to pretrain_gpt.py is parsed, legal on their GPUs, and fits these."""

import re
import shlex
from pathlib import Path

import pytest

from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.planner.memory import memory

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = {
    "pretrain_gpt2_one_gpu.sh": 1,
    "pretrain_llama3_8b.sh": 8,
    "pretrain_llama3_8b_1m_slurm.sh": 32,
    "pretrain_llama3_70b_64gpus.sh": 64,
    "pretrain_llama3_70b_64gpus_slurm.sh": 64,
    "pretrain_llama3_70b_128k_slurm.sh": 256,
    "pretrain_llama3_70b_slurm.sh": 128,
}


def test_every_script_is_checked() -> None:
    assert set(GPUS) == {path.name for path in EXAMPLES.glob("pretrain_*.sh")}


@pytest.mark.parametrize("name", GPUS)
def test_pretraining_script(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    words = text.split("pretrain_gpt.py")[-1].replace("\\\n", " ")
    words = re.sub(r"\$\{\w+:[?-]([^}]*)\}", "x", words).replace('"$@"', "")
    config, _, _, notes = load(shlex.split(words), parser("megasp pretrain", ""))
    layout = validate(config, GPUS[name], "cuda")
    assert layout.world_size == GPUS[name] and not notes
    assert max(rank.needed for rank in memory(config, layout)) < 80e9
    if "#SBATCH" in text:
        nodes = int(re.search(r"--nodes=(\d+)", text)[1])  # type: ignore[index]
        assert nodes * int(re.search(r"--gpus-per-node=(\d+)", text)[1]) == GPUS[name]  # type: ignore[index]
