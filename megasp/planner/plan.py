"""Find the parallel layout that trains a model fastest on given GPUs, in seconds, on any machine.

Every flag of a run may be given and then stands; what is not given is chosen: sizes of the axes, how the ring's ranks
exchange, pipeline schedule, virtual stages, microbatch, recompute, ZeRO stage.

    megasp plan --model llama3-70b --gpus 64 --gpu h100-80 --seq-length 8192 --global-batch-size 1024
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasp.config import load as config_load
from megasp.config.flags import Parser, build, flag
from megasp.config.fp8 import Fp8Config, refusal
from megasp.config.layout import Layout
from megasp.config.load import Source
from megasp.config.megatron_flags import translate
from megasp.errors import ConfigError
from megasp.planner import hardware, launch, longest, page, report
from megasp.planner.search import ANSWERS, AXES, Found, Plan, search
from megasp.planner.space import Request, layouts

DEFAULTS: dict[str, Any] = {"bf16": True, "mock_data": True, "lr": 1e-4, "train_iters": 100_000, "eval_iters": 0}
"""What a plan does not depend on, and a run must say."""


NEARBY = 64
"""How far from a number of GPUs that has no layout another is looked for."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan."""

    gpus: int = flag(8, "how many GPUs")
    gpu: str = flag("h100-80", f"kind of GPU, or its file: {', '.join(hardware.known())}", metavar="NAME|FILE.yaml")
    top: int = flag(5, "answers to print")
    explain: str | None = flag(
        None, "explain one layout: time and memory by component, what would have to change", metavar="LAYOUT"
    )
    html: str | None = flag(None, "write a page with timeline, memory and time of the answers", metavar="FILE")
    launch: str | None = flag(
        None, "print a script that starts the best answer, and nothing else", choices=launch.KINDS
    )
    max_seq_length: bool = flag(
        False, "the longest sequence that trains in --max-step-hours, the longest that fits, and what gets there"
    )
    max_step_hours: float = flag(12.0, "hours that a step of the longest sequence takes at most")
    dry_run: int = flag(0, "run the best N answers on fake tensors, and count their bytes", metavar="N")


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    parser = config_load.parser(prog, __doc__ or "", (PlanOptions,))
    given = _given(argv, parser)
    config, source, options, notes = config_load.load(argv, parser, PlanOptions, _defaults(given))
    if source.print_config:
        print(config_load.to_yaml(config), end="")
        return 0
    _check(options)
    request = Request(config, frozenset(given), options.gpus, hardware.load(options.gpu))
    _check_fp8(config.fp8, request.hardware)
    if options.max_seq_length:
        return _longest(request, options)
    if options.max_step_hours != PlanOptions.max_step_hours:
        rule = "it bounds the step of the longest sequence"
        raise ConfigError(f"--max-step-hours {options.max_step_hours:g}", rule, "add --max-seq-length, or leave it out")
    for name in ("html", "dry_run") if options.launch else ():
        if getattr(options, name):
            flag = name.replace("_", "-")
            rule = "a launch script is all that is printed"
            raise ConfigError(f"--{flag} with --launch", rule, f"plan twice: with --{flag}, then with --launch")
    if not config.training.global_batch_size:
        raise ConfigError(
            "no --global-batch-size", "layouts are compared at the same batch", "give the samples of a step"
        )
    if options.explain:
        return _explain(request, options)
    begun = time.perf_counter()
    found = search(request, max(ANSWERS, options.top, options.dry_run))
    seconds = time.perf_counter() - begun
    if not found.plans:
        raise _nothing(found, request)
    if options.launch:
        print(launch.script(found.plans[0], request, options.launch, source.model, given), end="")
        return 0
    print("\n".join([*notes, *_head(request, found, seconds), *report.table(found, request, options.top), ""]))
    print("what else was looked at, against the best")
    print("\n".join(f"  {line}" for line in report.rejections(found, request)))
    if options.html:
        Path(options.html).write_text(page.html(found, request, options.top))
        print(f"page in {options.html}")
    _dry_run(found.plans[: options.dry_run])
    return 0


def _longest(request: Request, options: PlanOptions) -> int:
    for name in ("explain", "html", "launch"):
        if getattr(options, name):
            rule = "the longest sequence has one answer, which is printed"
            raise ConfigError(f"--{name} with --max-seq-length", rule, f"plan that --seq-length again, with --{name}")
    found = longest.longest(request, options.max_step_hours)
    print("\n".join(longest.report(request, found, options.max_step_hours)))
    plans = [found.useful, *([found.fits] if found.fits is not found.useful else [])]
    _dry_run([plan for plan in plans if plan][: options.dry_run])
    return 0


def _dry_run(plans: list[Plan]) -> None:
    if plans:
        from megasp.planner import check  # which needs torch

        print("\n".join(check.table(plans)))


def _given(argv: Sequence[str], parser: Parser) -> dict[str, Any]:
    """Field -> value of what the user gave by flags and file, presets left out."""
    fields = {field.name for group in config_load.GROUPS.values() for field in dataclasses.fields(group)}
    flags = vars(parser.parse_args(translate(argv)[0]))
    values = config_load.from_file(build(Source, flags)) | flags
    return {name: value for name, value in values.items() if name in fields}


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """`DEFAULTS`, without those that contradict what was given."""
    others = {"mock_data": ("data_path", "train_data_path"), "train_iters": ("train_samples",), "bf16": ("fp16",)}
    lr = max(DEFAULTS["lr"], given.get("min_lr", 0.0), given.get("lr_warmup_init", 0.0))
    defaults = DEFAULTS | {"lr": lr}
    return {name: value for name, value in defaults.items() if not given.keys() & set(others.get(name, ()))}


def _check_fp8(config: Fp8Config, part: hardware.Hardware) -> None:
    if config.fp8_format is None:
        return
    if "fp8" not in part.matmul:
        raise ConfigError(
            f"--fp8-format on {part.name}", "it has no fp8 rate: nothing can be timed", "use --bf16 alone"
        )
    if part.capability is not None:
        reasons = {
            backend: refusal(backend, config.recipe, part.capability, config.fp8_format) for backend in config.backends
        }
        if all(reasons.values()):
            said = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
            raise ConfigError(f"--fp8-recipe {config.recipe} on {part.name}", said, "use --fp8-recipe tensorwise")


def _check(options: PlanOptions) -> None:
    for name in ("gpus", "top"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}", "it must be positive", "give 1 or more")
    if not 0 < options.max_step_hours < float("inf"):
        rule = "a step takes some time, and is to end"
        raise ConfigError(f"--max-step-hours {options.max_step_hours:g}", rule, "give a positive number")
    if options.dry_run < 0:
        raise ConfigError(f"--dry-run {options.dry_run}", "it is a number of answers", "give 1 or more")
    if options.html and not Path(options.html).parent.is_dir():
        raise ConfigError(f"--html {options.html}", "its directory does not exist", "make it, or name another file")
    for name in ("html", "launch", "dry_run"):
        if options.explain and getattr(options, name):
            raise ConfigError(
                f"--explain with --{name.replace('_', '-')}",
                "it explains one layout, and does nothing else",
                "give that layout's sizes as flags (--tensor-model-parallel-size ...) in place of --explain",
            )


def _head(request: Request, found: Found, seconds: float) -> list[str]:
    config, gpu = request.config, request.hardware
    return [
        f"{request.gpus} x {gpu.name}, {config.training.seq_length:,} tokens a sample, "
        f"{config.training.global_batch_size:,} samples a step: {found.space:,} layouts, {found.tried:,} combinations "
        f"timed in {seconds:.1f} s",
        "",
    ]


def _explain(request: Request, options: PlanOptions) -> int:
    """One layout: its best options by a search of that layout alone, beside the best of all."""
    wanted = Layout.parse(options.explain or "")
    ranks = wanted.world_size
    if request.gpus % ranks or (wanted.dp > 1 and ranks != request.gpus):
        near = ranks * max(1, round(request.gpus / ranks))
        raise ConfigError(
            f"--explain {options.explain} on {request.gpus} GPUs",
            f"its {ranks} ranks must be all of them, or a part that data parallelism multiplies",
            "leave dp out" if request.gpus % (ranks // wanted.dp) == 0 else f"say --gpus {near}, or other sizes",
        )
    axes = {
        "tensor_model_parallel_size": wanted.tp,
        "pipeline_model_parallel_size": wanted.pp,
        "ulysses_size": wanted.ulysses,
        "ring_size": wanted.ring,
    }
    if "zero" in (options.explain or ""):
        axes["data_parallel_sharding_strategy"] = ("no_shard", "optim", "optim_grads", "optim_grads_params")[
            wanted.zero
        ]  # type: ignore[assignment]
    only = Request(request.with_values(axes), request.given | frozenset(axes), request.gpus, request.hardware)
    found = search(only)
    if not found.plans:
        raise _nothing(found, only)
    print("\n".join(report.explain(found.plans[0], request, search(request))))
    return 0


def _nothing(found: Found, request: Request) -> ConfigError:
    """Why no layout is left, and what would."""
    gpu = request.hardware
    if found.host < float("inf"):
        return ConfigError(
            f"{request.gpus} x {gpu.name} with {gpu.host_memory / 1e9:.0f} GB of host memory a node",
            f"what fits the GPUs keeps {found.host / 1e9:.0f} GB there",
            "use more GPUs, keep less on the host, or say a larger host: memory_GB in a --gpu FILE.yaml",
        )
    if found.too_large:
        peak, _ = min(found.too_large.values(), key=lambda item: item[0])
        return ConfigError(
            f"{request.gpus} x {gpu.name}",
            f"no layout fits: the smallest needs {peak / 1e9:.0f} GB of {gpu.memory / 1e9:.0f} on a GPU",
            "use more GPUs or larger ones, a shorter sequence, or leave recompute and sharding to the planner",
        )
    asked = {name: getattr(request.config.parallel, name) for name in AXES[:4] if not request.free(name)}
    ranks = math.prod(asked.values())
    if request.gpus % ranks:
        return ConfigError(
            f"{request.gpus} GPUs for " + ", ".join(f"{name.replace('_', '-')} {n}" for name, n in asked.items()),
            f"the sizes that are given take {ranks} ranks, which must divide the GPUs",
            f"use {ranks * max(1, round(request.gpus / ranks))} GPUs, or leave a size to the planner",
        )
    if not found.illegal:
        try:
            request.legal({})  # sizes that are given and contradict each other
        except ConfigError as contradiction:
            return contradiction
    near = " or ".join(str(gpus) for gpus in _nearest(request))
    rules = Counter(error.rule for error in found.illegal.values())  # the one that most layouts break
    error = max(found.illegal.values(), key=lambda error: rules[error.rule], default=None)
    if error is not None:
        return error if not near else ConfigError(error.got, error.rule, f"{error.fix}; {near} GPUs have a layout")
    return ConfigError(
        f"{request.gpus} GPUs for global-batch-size {request.config.training.global_batch_size}",
        "no layout splits the model's heads and layers, the sequence and the batch over so many",
        f"use {near} GPUs" if near else "use a batch that more divisors of the GPUs divide",
    )


def _nearest(request: Request) -> list[int]:
    """The next smaller and larger number of GPUs that has a legal layout, as far as there is one nearby."""
    found = []
    for direction in (-1, 1):
        for gpus in range(request.gpus + direction, max(0, request.gpus + direction * NEARBY), direction):
            other = dataclasses.replace(request, gpus=gpus)
            if any(map(other.is_legal, layouts(other))):
                found.append(gpus)
                break
    return found
