"""Pretrains a GPT. Under torchrun use pretrain_gpt.py; `megasp pretrain` is the same in one process.

Flags carry Megatron-LM's names and defaults; `--config FILE.yaml` holds the same names.
"""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megasp import checkpoints, log, parallel_state, process_group
from megasp.config.context_parallel import on_nodes, split_context
from megasp.config.load import load, parser, to_yaml
from megasp.config.schema import Config
from megasp.config.stages import split, table
from megasp.config.tiles import mlp_tiles
from megasp.config.validate import validate
from megasp.data import BlendedDataset, Dataset, Loader
from megasp.data.phases import Phase, describe
from megasp.errors import CheckpointError, DataError
from megasp.model import linear_kernels
from megasp.model.flops import flops_per_token, parameter_count
from megasp.pipeline import trace
from megasp.pipeline.schedules import placement
from megasp.process_group import leave
from megasp.training import communication, resume
from megasp.training.build import Training, build
from megasp.training.datasets import (
    Datasets,
    build_datasets,
    build_loader,
    constant_batch,
    resolve,
    warn_of_sorted_corpora,
)
from megasp.training.devices import peak_tflops
from megasp.training.learning_rate import learning_rates
from megasp.training.memory import account, check_host_memory
from megasp.training.memory import table as memory_table
from megasp.training.metrics import Metrics, Run, peak_memory_gib
from megasp.training.profile import Profiler, profiler
from megasp.training.resume import Progress
from megasp.training.saving import Checkpoints
from megasp.training.step import StepResult, evaluate, train_step
from megasp.training.stop import StopConditions

MAX_SKIPPED_STEPS = 10
"""Steps in a row whose gradient may be NaN or infinite before the run ends."""


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config, source, _, notes = load(argv, parser(prog, (__doc__ or "").strip()))
    if source.print_config:
        print(to_yaml(config), end="")
        return 0
    for note in notes:
        log.info(note)
    config = on_nodes(resolve(config), process_group.ranks_of_node())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = validate(config, world_size, _device_type(config))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_host_memory(config, layout, ranks_here, host_memory())
    if config.offload.optimizer_cpu_offload:  # torchrun leaves each rank one
        torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // ranks_here))
        log.info(f"the optimizer's step on the host runs in {torch.get_num_threads()} threads of each rank")
    device = parallel_state.initialize_distributed(
        config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes
    )
    try:
        if config.parallel.nproc_per_node is not None:
            process_group.check_nodes_agree(config.parallel.nproc_per_node, device)
        pretrain(build(config, parallel_state.build(layout, device)))
    except BaseException:
        leave(failed=True)
        raise
    leave(failed=False)
    return 0


def host_memory() -> int:
    """Bytes of this machine's memory, or of the part that its container (cgroup v2) may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))


def _device_type(config: Config) -> str:
    return "cuda" if torch.cuda.is_available() and config.parallel.distributed_backend != "gloo" else "cpu"


def pretrain(training: Training) -> Progress:
    """Train from the start or the last checkpoint to the last step, or to a reason to stop; return how far it came."""
    config, state = training.config, training.state
    found = resume.find(config, state)
    phases = resume.data_phases(config, state.layout, found)
    datasets = build_datasets(config, phases[-1])
    if config.checkpoint.save:
        checkpoints.check_writable(Path(config.checkpoint.save))
    start = resume.resume(training, found)
    _check_save(config, start)
    train_steps = config.train_steps(state.layout, start.step, start.samples)
    _introduce(training, datasets, phases, start, train_steps)
    run = Run(
        layout=state.layout.name,
        devices=state.layout.world_size,
        device=state.device,
        flops_per_token=flops_per_token(config.model, config.training.seq_length),
        peak_tflops=config.logging.peak_tflops or peak_tflops(state.device, training.dtype),
        train_steps=train_steps,
        start_step=start.step,
    )
    loader = build_loader(config, state, training.shards, datasets.train, start.samples)
    metrics = Metrics(
        run,
        file=_metrics_file(config),
        tensorboard_dir=Path(config.logging.tensorboard_dir) if config.logging.tensorboard_dir else None,
        log_interval=config.logging.log_interval,
    )
    stop = StopConditions(
        exit_interval=config.training.exit_interval,
        exit_duration_in_mins=config.training.exit_duration_in_mins,
        device=state.device,
    )
    saves = Checkpoints(training, phases, start.step)
    profile = profiler(config, state.rank, start.step)
    with loader, metrics, stop, saves, profile:
        return _Loop(training, datasets, saves, loader, metrics, stop, profile).run(start, run.train_steps)


class _Loop:
    """The steps of a run, and what happens between them."""

    def __init__(
        self,
        training: Training,
        datasets: Datasets,
        saves: Checkpoints,
        loader: Loader,
        metrics: Metrics,
        stop: StopConditions,
        profile: Profiler,
    ) -> None:
        self.training, self.datasets, self.saves = training, datasets, saves
        self.loader, self.metrics, self.stop, self.profile = loader, metrics, stop, profile
        self.skipped = 0

    def run(self, progress: Progress, train_steps: int) -> Progress:
        config = self.training.config
        start = progress.step
        while progress.step < train_steps:
            done = config.training.done(progress.step, progress.samples)
            lr, decoupled_lr = learning_rates(done, config.optimizer, config.training.length)
            began = time.perf_counter()
            microbatches = self.loader.step()
            communication.reset(self.training)
            with trace.recording(self.training.pipeline, self._trace_file(progress.step - start, train_steps - start)):
                result = train_step(self.training, microbatches, lr, decoupled_lr)
            samples = self.loader.consumed_samples - progress.samples
            progress = Progress(progress.step + 1, self.loader.consumed_samples, progress.tokens + result.tokens)
            self.metrics.step(
                progress.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=lr,
                decoupled_lr=decoupled_lr,
                tokens=progress.tokens,
                read=samples * config.training.seq_length,
                seconds=time.perf_counter() - began,
                loss_scale=result.loss_scale if config.training.fp16 else None,
            )
            if config.logging.log_comm and (progress.step == 1 or progress.step % config.logging.log_interval == 0):
                communication.report(self.training, microbatches)
            self._check_finite(progress, result)
            last = progress.step == train_steps
            reason = self.stop.reason(progress.step, self.saves.failed)
            # Before an evaluation, which could fail or be killed.
            self.saves.after_step(progress, last=last or reason is not None)
            if config.training.eval_iters and (last or progress.step % config.training.eval_interval == 0):
                for name, dataset in self.datasets.valid.items():
                    self.metrics.validation(progress.step, loss=self._loss_on(dataset), name=name)
                if last and self.datasets.test is not None:
                    self.metrics.validation(progress.step, loss=self._loss_on(self.datasets.test), name="test")
            if reason and not last:
                log.info(f"stopping after step {progress.step}: {reason}")
                break
            self.profile.step()
        self._report_memory()
        _say_what_next(config, progress, train_steps)
        return progress

    def _report_memory(self) -> None:
        """The account of memory beside what was measured."""
        state = self.training.state
        on_gpu = state.device.type == "cuda"
        name = "measured" if on_gpu else "resident memory"
        measured = {name: [round(peak_memory_gib(state.device) * 2**30)]}
        log.info("memory of rank 0 at the fullest moment of a step, by the account of `megasp memory`, and measured")
        expected = account(self.training.config, state.layout, state.pp.rank, state.device.type)
        for line in memory_table([expected], measured):
            log.info("  " + line)
        if not on_gpu:
            log.info("  (a CPU tells the whole process's: Python, libraries, corpus and freed memory are in it, too)")

    def _trace_file(self, step: int, steps: int) -> str | None:
        """Where --trace writes what happens in step number `step` of this run: its second, as the first warms up."""
        return self.training.config.logging.trace if step == min(1, steps - 1) else None

    def _check_finite(self, progress: Progress, result: StepResult) -> None:
        """Tell of a step whose gradient was NaN or infinite (it was not applied), and end a run of many such.

        An overflow of fp16 does not count while the loss scale can fall.
        """
        scale = self.training.loss_scale
        finite = math.isfinite(result.grad_norm)
        self.skipped = 0 if finite or scale.can_fall else self.skipped + 1
        if not finite:
            overflow = f" at loss scale {result.loss_scale:g}" if self.training.config.training.fp16 else ""
            log.info(
                f"step {progress.step}: loss {result.loss}, gradient norm {result.grad_norm}{overflow}: weights not "
                f"updated" + (f", loss scale now {scale.scale:g}" if overflow else "")
            )
        if self.skipped == MAX_SKIPPED_STEPS:
            raise DataError(
                f"{self.skipped} steps in a row had no finite gradient",
                "training cannot recover from that",
                "resume from the last checkpoint with a lower --lr, a longer warm-up, or --clip-grad 1.0",
            )

    def _loss_on(self, dataset: Dataset) -> float:
        """Mean loss of the first --eval-iters global batches of a held-out dataset, the same ones every time."""
        training, config = self.training, constant_batch(self.training.config)
        batch = config.global_batch_size(training.state.layout)
        with build_loader(config, training.state, training.shards, dataset) as loader:
            return evaluate(training, (loader.read(step * batch) for step in range(config.training.eval_iters)))


def _metrics_file(config: Config) -> Path | None:
    if config.logging.metrics_file:
        return Path(config.logging.metrics_file)
    return Path(config.checkpoint.save, "metrics.jsonl") if config.checkpoint.save else None


def _check_save(config: Config, start: Progress) -> None:
    """Refuse to begin a run over the checkpoints of another, and say when nothing will be kept."""
    save, interval = config.checkpoint.save, config.checkpoint.save_interval
    if save is None:
        log.info(
            "nothing will be saved (no --save)" + (f": --save-interval {interval} has no effect" if interval else "")
        )
    elif start.step == 0 and checkpoints.find_latest(Path(save)) is not None:
        raise CheckpointError(
            f"--save {save} holds checkpoints of another run",
            "a run that starts anew would replace them and its metrics",
            f"add --load {save} to go on with it, or name another directory",
        )
    if config.logging.trace:
        Path(config.logging.trace).parent.mkdir(parents=True, exist_ok=True)


def _introduce(training: Training, datasets: Datasets, phases: Sequence[Phase], start: Progress, steps: int) -> None:
    """Say what will run, before it runs; and keep the effective configuration with the run."""
    config, layout = training.config, training.state.layout
    batch, model = config.global_batch_size(layout), config.model
    dtype = str(training.dtype).removeprefix("torch.")
    log.info(f"layout {layout.name}: {layout.describe()}, on {training.state.device.type}")
    context = split_context(config)
    if context.reason:
        log.info(f"context parallel {layout.cp}: {context.reason}")
    if config.activations.activation_tile_mb is not None:
        log.info(
            f"--activation-tile-mb {config.activations.activation_tile_mb}: MLPs in {mlp_tiles(config, layout)} tiles"
        )
    for line in _stage_table(config):
        log.info(line)
    log.info(
        f"model: {parameter_count(model):,} parameters, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"vocabulary {model.padded_vocab_size}; compute in {dtype}"
    )
    log.info(
        f"kernels: attention {training.attention_kernel}, "
        f"{config.kernels.described(training.norm_kernel, training.optimizer_kernel, training.state.device.type)}"
    )
    if config.fp8.fp8_format is not None:
        log.info(f"fp8: {linear_kernels.describe(config.fp8, model.num_layers, training.state.device)}")
    log.info(
        f"training: steps {start.step + 1} to {steps}, {batch} samples of {config.training.seq_length} tokens a step "
        f"({config.num_microbatches(layout)} microbatches of {config.training.micro_batch_size} "
        f"on each of {layout.dp} replicas)"
    )
    for line in [*(describe(phase)[0] for phase in phases[:-1]), *describe(phases[-1])]:
        log.info(f"data: {line}")
    if isinstance(datasets.train, BlendedDataset):
        left = config.batch_schedule(layout).advance(start.samples, steps - start.step) - start.samples
        for line in datasets.train.epochs(start.samples, left):
            log.info(f"data: {line}")
    if training.state.rank == 0:
        warn_of_sorted_corpora(phases[-1])
    log.info(
        "loss: mean over all target tokens of the global batch (Megatron-LM averages over microbatches by default)"
    )
    if config.checkpoint.save and training.state.rank == 0:
        Path(config.checkpoint.save, "config.yaml").write_text(to_yaml(config))


def _stage_table(config: Config) -> list[str]:
    """Schedule and stages, where there is a pipeline."""
    plan = config.pipeline
    if plan.ranks == 1:
        return []
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    return [f"pipeline: {plan.schedule}, {plan.stages} stages on {plan.ranks} ranks", *table(split(config), owner)]


def _say_what_next(config: Config, progress: Progress, train_steps: int) -> None:
    if not config.checkpoint.save:
        return
    root = config.checkpoint.save
    if progress.step < train_steps:
        log.info(f"to go on: the same command with --load {root}")
    else:
        log.info(
            f"trained {progress.step} steps, {progress.tokens:,} tokens; metrics in {_metrics_file(config)}; next:"
        )
        log.info(f'  megasp generate --load {root} --prompt "..."')
        log.info(f"  megasp convert to-hf --load {root} --output {root}-hf")
