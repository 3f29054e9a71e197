"""The launch scripts of examples/, run by bash with launchers that only note their arguments: what they hand to
pretrain_gpt.py is parsed, legal on their GPUs, and fits these."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megasp import cli
from megasp.config.load import load, parser
from megasp.config.validate import validate
from megasp.planner.memory import memory

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = {
    "pretrain_gpt2_one_gpu.sh": 1,
    "pretrain_llama3_8b.sh": 8,
    "pretrain_llama3_8b_1m_slurm.sh": 32,
    "pretrain_llama3_8b_2m_phases_slurm.sh": 64,
    "pretrain_llama3_70b_64gpus.sh": 64,
    "pretrain_llama3_70b_64gpus_slurm.sh": 64,
    "pretrain_llama3_70b_128k_slurm.sh": 256,
    "pretrain_llama3_70b_slurm.sh": 128,
    "pretrain_from_hf_128k_slurm.sh": 32,
}

LAUNCHERS = {
    "srun": 'exec "$@"',
    "scontrol": "echo node0",
    "torchrun": 'printf "%s\\n" "$@" END >> "$NOTES"',
    "megasp": 'printf "%s\\n" "$@" END >> "$NOTES"',
}

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def handed_on(name: str, folder: Path) -> list[list[str]]:
    """The arguments of every program that a script starts."""
    (folder / "bin").mkdir()
    for launcher, words in LAUNCHERS.items():
        file = folder / "bin" / launcher
        file.write_text(f"#!/usr/bin/env bash\n{words}\n")
        file.chmod(0o755)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(LLAMA))
    slurm = {"SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "HEAD": "node0", "NNODES": "1"}
    notes = folder / "notes"
    environment = os.environ | slurm | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "NOTES": str(notes), "DATA": "data", "TOKENIZER": "t.json",
        "HF": str(folder / "hf"),
    }  # fmt: skip
    subprocess.run(["bash", EXAMPLES / name], cwd=folder, env=environment, check=True, capture_output=True, timeout=300)
    return [call.splitlines() for call in notes.read_text().split("\nEND\n")[:-1]]


def test_every_script_is_checked() -> None:
    assert set(GPUS) == {path.name for path in EXAMPLES.glob("pretrain_*.sh")}


@pytest.mark.parametrize("name", GPUS)
def test_pretraining_script(name: str, tmp_path: Path) -> None:
    calls = handed_on(name, tmp_path)
    assert len(calls) == (3 if "phases" in name else 1)
    for words in calls:
        config, _, _, notes = load(words[words.index("pretrain_gpt.py") + 1 :], parser("megasp pretrain", ""))
        layout = validate(config, GPUS[name], "cuda")
        assert layout.world_size == GPUS[name] and not notes
        assert max(rank.needed for rank in memory(config, layout)) < 80e9
    text = (EXAMPLES / name).read_text()
    if "#SBATCH" in text:
        nodes = int(re.search(r"--nodes=(\d+)", text)[1])  # type: ignore[index]
        assert nodes * int(re.search(r"--gpus-per-node=(\d+)", text)[1]) == GPUS[name]  # type: ignore[index]


def test_layout_tuning(tmp_path: Path) -> None:
    """Its commands of megasp are parsed, and what it explains is a layout."""
    from megasp.config.layout import Layout
    from megasp.planner.plan import PlanOptions

    calls = handed_on("tune_layout.sh", tmp_path)
    assert [words[0] for words in calls] == ["plan"] * 3
    for words in calls:
        _, _, options, _ = load(words[1:], parser("megasp plan", "", (PlanOptions,)), PlanOptions, {"bf16": True})
        assert options.gpus == 64 and (options.explain is None or Layout.parse(options.explain).world_size == 64)


MEGATRON_GPT3_175B = (
    "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 "
    "--attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 "
    "--train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 "
    "--clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 "
    "--lr-decay-iters 430000 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path data "
    "--vocab-file vocab.json --merge-file merges.txt --split 949,50,1 --log-interval 100 --save-interval 10000 "
    "--eval-interval 1000 --save run --load run --eval-iters 10 --tensorboard-dir board"
)
"""What Megatron-LM's examples/gpt3 hands to its pretrain_gpt.py."""

MEGATRON_LLAMA3_8B = (
    "--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 "
    "--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 "
    "--hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused "
    "--apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear "
    "--micro-batch-size 1 --global-batch-size 128 "
    "--train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --decoupled-lr 5.0e-4 "
    "--decoupled-min-lr 4.5e-5 --lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine --clip-grad 1.0 "
    "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion "
    "--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --tensor-model-parallel-size 1 "
    "--context-parallel-size 1 --sequence-parallel --mock-data --tokenizer-type NullTokenizer --vocab-size 128256 "
    "--data-cache-path cache --tiktoken-pattern v2 --split 99,1,0 --no-create-attention-mask-in-dataloader "
    "--no-mmap-bin-files --num-workers 1 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 "
    "--log-throughput --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist "
    "--distributed-timeout-minutes 60 --save run --load run --tensorboard-dir board"
)
"""What its examples/llama for 8B on H100 does in bf16."""


@pytest.mark.parametrize(("flags", "gpus"), [(MEGATRON_GPT3_175B, 1024), (MEGATRON_LLAMA3_8B, 8)])
def test_megatrons_own_examples(flags: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(flags.split(), parser("megasp pretrain", ""))[0]
    assert validate(config, gpus, "cuda").world_size == gpus
    assert cli.main(["pretrain", *flags.split(), "--print-config"]) == 0
    assert "num-layers" in capsys.readouterr().out
