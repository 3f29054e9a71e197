"""A script that starts a plan: torchrun or Slurm, every flag written out, begun again where it fails."""

import dataclasses
import shlex
import typing
from collections.abc import Mapping
from typing import Any

from megasp.config.flags import option_string
from megasp.config.load import GROUPS
from megasp.planner.search import Plan
from megasp.planner.space import Request

KINDS = ("torchrun", "slurm")

TRAINING: dict[str, Any] = {
    "train_iters": 100000, "lr": 1.5e-4, "min_lr": 1.5e-5, "lr_decay_style": "cosine", "lr_warmup_iters": 2000,
    "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 1.0, "eval_interval": 1000, "eval_iters": 20,
    "log_interval": 10, "save_interval": 500,
}  # fmt: skip
"""What a plan does not say and a run needs, where the user did not."""

RESTARTS = 3
"""How often torchrun begins again after a failure; the run goes on from its last checkpoint."""


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The flags that say these fields of a configuration.

    flags_of({"bf16": True, "lr": 1e-4, "add_bias_linear": False})    --bf16 --lr 0.0001 --disable-bias-linear
    """
    made = []
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            if field.name not in values:
                continue
            flag, value = option_string(field), values[field.name]
            if typing.get_type_hints(group)[field.name] is bool:
                made += [flag] * (value != bool(field.metadata["off"]))
            elif value not in (None, ()):
                made += [flag, *map(str, value if isinstance(value, tuple | list) else [value])]
    return made


def script(plan: Plan, request: Request, kind: str, preset: str | None, given: Mapping[str, Any]) -> str:
    """The script.

    Args:
        kind: one of `KINDS`.
        preset: the --model that was asked for.
        given: field -> value of every flag that the user gave.
    """
    gpus, node = request.gpus, min(request.gpus, request.hardware.node_gpus)
    training = {name: value for name, value in TRAINING.items() if name not in given}
    if "train_samples" in given:
        training = {name: value for name, value in training.items() if name not in ("train_iters", "lr_warmup_iters")}
        if "lr_warmup_samples" not in given:
            training.setdefault("lr_warmup_fraction", 0.02)
    values = training | {"bf16": plan.config.training.bf16} | dict(given) | dict(plan.values)
    flags = (["--model", preset] if preset else []) + flags_of(values)
    lines = _wrapped(flags)
    if not (given.keys() & {"data_path", "train_data_path", "mock_data"}):
        lines.append('    --data-path "${DATA:?prefix of a .bin/.idx pair}"')
    if "tokenizer_type" not in given:
        lines.append('    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}"')
    if "save" not in given:
        lines.append(f'    --save "${{SAVE:-{_run(plan)}}}" --load "${{SAVE:-{_run(plan)}}}"')
    body = " \\\n".join([*lines, '    "$@"'])
    said = (
        f"# {plan.layout.describe()}\n# on {request.hardware.name}; `megasp plan` predicts {plan.time.seconds:.3g} s a "
        f"step and {plan.peak / 1e9:.0f} GB a GPU. Start it in the directory of this repository."
    )
    return (_slurm if kind == "slurm" else _torchrun)(said, gpus, node, body, _run(plan))


def _run(plan: Plan) -> str:
    return f"run-{plan.layout.name}"


def _wrapped(flags: list[str], width: int = 110) -> list[str]:
    """Flags with their values, as many on a line as fit."""
    lines, line = [], "   "
    for index, word in enumerate(flags):
        value = [] if word.startswith("--") is False else flags[index : index + 1]
        piece = shlex.quote(word)
        if value and len(line) + len(piece) > width:
            lines.append(line)
            line = "   "
        line += " " + piece
    return [*lines, line] if line.strip() else lines


def _torchrun(said: str, gpus: int, node: int, body: str, name: str) -> str:
    nodes = -(-gpus // node)
    where = (
        "--standalone"
        if nodes == 1
        else (
            f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id {name} \\\n    "
            '--rdzv-endpoint "${HEAD:?address of the first node}:29500"'
        )
    )
    start = "" if nodes == 1 else f"# Start it on each of the {nodes} nodes, with the same HEAD.\n"
    return f"""#!/usr/bin/env bash
{said}
{start}set -euo pipefail
exec torchrun {where} \\
    --nproc-per-node {node} --max-restarts {RESTARTS} \\
    pretrain_gpt.py \\
{body}
"""


def _slurm(said: str, gpus: int, node: int, body: str, name: str) -> str:
    nodes = -(-gpus // node)
    return f"""#!/usr/bin/env bash
{said}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={node}
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node {node} --max-restarts {RESTARTS} \\
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \\
    pretrain_gpt.py \\
{body}
"""
