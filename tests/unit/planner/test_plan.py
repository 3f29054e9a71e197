"""`megasp plan`: answers that fit and are legal, the script that starts one, the page, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.search import compared, request_of
from megasp import cli
from megasp.config.layout import Layout
from megasp.config.load import from_values, load, parser
from megasp.config.presets import PRESETS
from megasp.config.validate import validate
from megasp.planner.hardware import load as load_gpu
from megasp.planner.search import CLOSE, Found, search
from megasp.planner.space import Request, recomputes, shardings

SMALL = ["plan", "--model", "llama3-8b", "--gpus", "8", "--global-batch-size", "64", "--seq-length", "8192"]
NARROW = {
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "ring_size": 1, "ulysses_size": 1,
}  # fmt: skip
FIXED = ["--pipeline-model-parallel-size", "1", "--ring-size", "1"]


def request(gpus: int = 8, **values: object) -> Request:
    base = {"bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0, "global_batch_size": 64}
    config = from_values(PRESETS["llama3-8b"] | base | values)
    return Request(config, frozenset(values), gpus, load_gpu("h100-80"))


@pytest.fixture(scope="module")
def found() -> Found:
    return search(request(ring_size=1))


def test_answers_are_legal_fit_and_differ(found: Found) -> None:
    assert len(found.plans) >= 5
    names = [(plan.layout.tp, plan.layout.pp, plan.layout.cp) for plan in found.plans]
    assert len(set(names)) == len(names)
    for plan in found.plans:
        assert validate(plan.config, 8, "cuda") == plan.layout
        assert plan.peak <= 80e9
    times = [plan.time.seconds for plan in found.plans]
    assert times == sorted(times)


def test_little_is_looked_into() -> None:
    """Of the 220,000 combinations of 70B on 64 GPUs few are timed, and fewer counted by the account."""
    big = request(64, **{**PRESETS["llama3-70b"], "seq_length": 8192, "global_batch_size": 1024})
    found = search(big)
    assert found.space > 300 and found.tried < 8000 and found.accounts < 800
    assert len(found.plans) == 10 and all(plan.time.parts for plan in found.plans)


def test_offloaded_activations_do_not_count_on_the_gpu() -> None:
    """A search that may offload finds what fits with it alone."""
    alone = {"recompute_granularity": "full", "tiled_mlp": 8, "cpu_offloading_activations": True}
    sharded = {"data_parallel_sharding_strategy": "optim_grads_params", "ulysses_size": 8, "micro_batch_size": 1}
    long = {"seq_length": 2**21, "global_batch_size": 1, "tensor_model_parallel_size": 1} | sharded
    plan = search(request(8, **long)).plans[0]
    assert alone.items() <= plan.values.items() and plan.memory[0].host > 50e9


def test_a_bound_is_never_above_an_answer(found: Found) -> None:
    """What was left out is slower than the best by all that the closed forms may be off."""
    assert found.bounds and min(seconds for seconds, _ in found.bounds.values()) * CLOSE > found.plans[0].time.seconds


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
def test_the_script_says_every_flag(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What it hands to pretrain_gpt.py is parsed by the parser of training, and validated there."""
    assert cli.main([*SMALL, *FIXED, "--launch", kind]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/usr/bin/env bash") and ("#SBATCH --nodes=1" in script) == (kind == "slurm")
    words = script.split("pretrain_gpt.py")[1].replace("\\\n", " ")
    words = re.sub(r"\$\{\w+:[?-]([^}]*)\}", "x", words).replace('"$@"', "")
    config, _, _, notes = load(shlex.split(words), parser("megasp pretrain", ""))
    assert not notes and config.training.global_batch_size == 64
    assert config.model.num_layers == 32 and config.training.bf16
    assert validate(config, 8, "cuda").world_size == 8


def test_the_table_and_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    fixed = "--ring-size 1 --ulysses-size 1 --pipeline-model-parallel-size 2"
    assert cli.main([*SMALL, *fixed.split(), "--top", "3", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ 1  tp\d-pp2-u1-r1-dp\d", out, re.M) and "tp4: +" in out
    html = page.read_text()
    assert "<svg" in html and html.count("<tr>") > 6 and "outside PyTorch" in html and "idle" in html
    assert not re.search(r"<script|<link|src=|url\(|https?://(?!www.w3.org/2000/svg)", html), "one file, no network"


def test_the_attention_kernel_is_chosen_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """cuDNN's on an H100, where nothing speaks against it; what is given stands; packages are named beside."""
    assert search(request(**NARROW)).plans[0].values["attention_backend"] == "fused"
    for other in ({"attention_backend": "flash"}, {"head_dim": 256}, {"reset_attention_mask": True}):
        values = NARROW | ({"kv_channels": 256} if "head_dim" in other else other)
        assert search(request(**values)).plans[0].config.training.attention_backend != "fused"
    flags = [word for name, n in NARROW.items() for word in (f"--{name.replace('_', '-')}", str(n))]
    for more, said in (
        ([], "--attention-backend fused, not run on a GPU yet); +"),
        (["--attention-backend", "auto"], "cuDNN's attention (--attention-backend fused): -"),
        ([], "where module flash_attn_interface is installed): -"),
    ):
        assert cli.main([*SMALL, *flags, *more]) == 0
        assert said in capsys.readouterr().out
    assert cli.main([*SMALL, *flags, "--launch", "torchrun"]) == 0
    assert "--attention-backend fused" in capsys.readouterr().out


def test_an_a100_has_no_rates_of_cudnn() -> None:
    old = Request(request(**NARROW).config, frozenset(NARROW), 8, load_gpu("a100-80"))
    assert old.attention_kernel is None


@pytest.mark.parametrize(
    ("preset", "gpus", "length", "batch"),
    [("llama3-8b", 8, 8192, 64), ("llama3-8b", 8, 1048576, 1), ("llama3-70b", 8, 327680, 1)],
)
def test_nothing_better_is_missed(preset: str, gpus: int, length: int, batch: int) -> None:
    """Everything there is, timed without bounds; benchmarks/search.py compares more and larger ones."""
    _, plan, best = compared(request_of(preset, gpus, length, batch))
    assert best.combinations > 1000 and best.difference < CLOSE - 1
    assert plan.time.seconds <= 1.001 * best.seconds


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--micro-batch-size", "1", "--recompute-granularity", "full", "--ring-size", "1"]
    assert cli.main([*SMALL, *fixed, "--explain", "tp2-pp2-u1-dp2"]) == 0
    out = capsys.readouterr().out
    for words in ("matrix products", "optimizer states", "pipeline rank", "Against the best", "recompute"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model llama3-8b --gpus 8", "--global-batch-size"),
        ("--model llama3-8b --gpus 8 --gpu x100 --global-batch-size 8", "--gpu x100"),
        ("--model llama3-8b --gpus 0 --global-batch-size 8", "--gpus 0"),
        ("--model llama3-8b --gpus 8 --gpu a100-80 --fp8-format hybrid --bf16", "has no fp8 rate"),
        ("--model llama3-8b --gpus 8 --fp8-format hybrid --fp8-recipe mxfp8 --bf16", "mxfp8 scales need compute"),
        ("--model llama3-8b --gpus 8 --max-seq-length --html page.html", "--html with --max-seq-length"),
        ("--model llama3-8b --gpus 8 --max-seq-length --max-step-hours 0", "--max-step-hours 0"),
        ("--model llama3-9b --gpus 8", "as --help says"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --gpuss 3", "did you mean --gpus"),
        ("--model llama3.1-405b --gpus 1 --gpu a100-40 --global-batch-size 8 --micro-batch-size 1", "no layout fits"),
        ("--model llama3.1-405b --gpus 1 --global-batch-size 8 --micro-batch-size 1", "what fits the GPUs keeps"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain tp3", "ranks must be"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain t8", "layout name"),
        ("--model llama3-8b --gpus 6 --global-batch-size 8 --tensor-model-parallel-size 6", "num-attention-heads"),
        ("--model llama3-8b --gpus 7 --global-batch-size 8 --ring-size 1 --ulysses-size 1"
         " --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1", "multiple of their product"),
        ("--model llama3-8b --gpus 7 --global-batch-size 8 --ring-size 1 --ulysses-size 1"
         " --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1", "4 or 8 GPUs have a layout"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain tp5-pp3", "--explain tp5-pp3 on 8 GPUs"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain tp3-pp2", "say --gpus 6, or other sizes"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain tp4-dp4", "leave dp out"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --explain tp8 --launch slurm", "--explain with --launch"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --html /no/such/page.html", "its directory does not exist"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --context-parallel-size 4 --ulysses-size 4 --ring-size 2",
         "context-parallel-size 4"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --ulysses-size 3", "take 3 ranks, which must divide"),
        ("--model llama3-8b --gpus 6 --global-batch-size 6 --explain tp3-pp2", "num-attention-heads"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --pipeline-model-parallel-size 2"
         " --pipeline-model-parallel-layout Et|tx", "pipeline-model-parallel-layout"),
        ("--model llama3-8b --gpus 8 --global-batch-size 8 --recompute-granularity some", "recompute-granularity"),
    ],
)  # fmt: skip
def test_refused(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *flags.split()]) == 2
    assert said in capsys.readouterr().err


def test_the_host_takes_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8B on one GPU has its optimizer on the host, or is refused where that is too small."""
    flags = ["plan", "--model", "llama3-8b", "--gpus", "1", "--global-batch-size", "1", "--ring-size", "1"]
    assert cli.main([*flags, "--top", "1"]) == 0
    assert "on the host" in capsys.readouterr().out
    small = tmp_path / "small.yaml"
    small.write_text("base: h100-80\nname: small\nhost: {link_GBps: 50, memory_GBps: 400, memory_GB: 10}\n")
    assert cli.main([*flags, "--gpu", str(small)]) == 2
    assert "10 GB of host memory" in capsys.readouterr().err


def test_the_longest_sequence_has_a_step_that_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8B on one GPU: 3 hours a step at what fits, less at the other answer."""
    flags = ["plan", "--model", "llama3-8b", "--gpus", "1", "--max-seq-length"]
    assert cli.main([*flags, "--max-step-hours", "1"]) == 0
    useful, rate, fits, _ = capsys.readouterr().out.splitlines()
    assert useful.startswith("with a step of at most 1 hours: ") and fits.startswith("by memory alone")
    short, long = (int(re.findall(r"([\d,]+) tokens on", line)[0].replace(",", "")) for line in (useful, fits))
    assert 2 * short < 2 * long < 5 * short
    assert 0.97 * 3600 < float(re.findall(r"([\d.e+]+) s a step", rate)[0]) <= 3600
    assert cli.main(flags) == 0
    assert f"{long:,} tokens" in capsys.readouterr().out.splitlines()[0], "half a day does"


def test_dry_run_of_the_longest_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With weights on the host and in chunks, as the closed forms say."""
    small = tmp_path / "small.yaml"
    small.write_text("base: h100-80\nname: small\nmemory_GB: 3.3\n")
    flags = f"--model tiny --vocab-size 512 --gpus 1 --gpu {small} --max-seq-length --dry-run 2"
    assert cli.main(["plan", *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "chunks" in out and "weights and optimizer on the host" in out and "the same on the host, GB" in out
    for words in ("attention", "matrix products"):
        assert re.search(rf"{words} .*=", out), "counted as the closed forms say"


def test_calibrate(tmp_path: Path) -> None:
    from megasp.planner import calibrate

    calibrate_file = tmp_path / "cpu.yaml"
    assert cli.main(["calibrate", "--output", str(calibrate_file)]) == 0
    gpu = load_gpu(str(calibrate_file))
    assert 0 < gpu.matmul["bf16"] < 1e14 and gpu.attention["flash"].rate(True, 128, 256) > 0
    assert calibrate.REPEATS


def test_dry_run_of_sharded_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """The real build and step of the answer on fake tensors."""
    flags = (
        "--model tiny --vocab-size 8192 --gpus 4 --global-batch-size 8 --pipeline-model-parallel-size 2 --ring-size 1"
    )
    sharded = "--data-parallel-sharding-strategy optim_grads_params --ulysses-size 1 --tensor-model-parallel-size 1"
    assert cli.main(["plan", *flags.split(), *sharded.split(), "--dry-run", "1"]) == 0
    out = capsys.readouterr().out
    (line,) = re.findall(r"the account of it.*", out)
    errors = re.findall(r"([+-]\d+\.\d)%", line)
    assert len(errors) == 2 and all(abs(float(error)) <= 3 for error in errors)
    for words in ("all-gather over dp_cp", "matrix products"):
        assert re.search(rf"{words} .*=.*=", out), "counted as the closed forms say"


def test_what_is_given_stands() -> None:
    config = from_values(PRESETS["llama3-8b"] | {"seq_length": 8192, "tiled_mlp": 4, "lr": 1e-4, "train_iters": 9})
    request = Request(config, frozenset({"tiled_mlp"}), 8, load_gpu("h100-80"))
    options = recomputes(request, Layout(dp_inner=8))
    assert len(options) > 3 and all(option.values.get("tiled_mlp", 4) == 4 for option in options)
    assert len(shardings(request, Layout(dp_inner=8))) == 4
