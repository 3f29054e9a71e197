"""What a checkpoint keeps of a run, and how a run goes on from it: weights, optimizer, step, and data position.

There is no random state to keep: initial weights, sample order and dropout are pure functions of the seed.
"""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megasp import __version__, checkpoints, log
from megasp.checkpoints import Manifest, Saver, Shard
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data.phases import Phase, from_json, go_on, to_json
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState
from megasp.training.build import Training
from megasp.training.datasets import phase_of
from megasp.training.optimizer import set_step, steps_taken

OF_A_CHECKPOINT = ("finetune", "no_load_optim", "no_load_rng")
"""Options that say what to take from a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: finished steps, and the samples and unmasked target tokens that they trained."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def shards(training: Training, optimizer: bool) -> list[Shard]:
    """The master weights of this rank, and with `optimizer` their moments."""
    owner = training.replicas.owner
    held = []
    for master in training.optimizer.masters:
        tensors = {"model": master.data}
        if optimizer:
            tensors |= {kind: training.optimizer.state[master][kind] for kind in ("exp_avg", "exp_avg_sq")}
        held += [Shard(kind, tensor, master.pieces, owner) for kind, tensor in tensors.items()]  # type: ignore[attr-defined]
    return held


def save(training: Training, progress: Progress, phases: Sequence[Phase], saver: Saver | None = None) -> None:
    """Write a checkpoint of this moment; every rank calls it.

    Args:
        saver: writes it, and its `wait` has the outcome; without one it is written here and now.
    """
    config = training.config
    metadata = {
        "config": dataclasses.asdict(config),
        "progress": dataclasses.asdict(progress),
        "data": {"phases": to_json(phases)},
        "rng": {"seed": config.training.seed},
        "has_optimizer": not config.checkpoint.no_save_optim,
        "optimizer_steps": max(steps_taken(part) for part in training.optimizer.parts),
        "loss_scale": training.loss_scale.state(),
        "versions": {
            "megasp": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    held = shards(training, optimizer=not config.checkpoint.no_save_optim)
    if saver is not None:
        saver.save(progress.step, held, metadata)
        return
    with Saver(config.checkpoint.save or "", training.state) as own:
        own.save(progress.step, held, metadata)


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from, or takes the weights of.

    Attributes:
        weights_alone: step, optimizer and data position start anew.
    """

    directory: Path
    manifest: Manifest
    weights_alone: bool


def find(config: Config, state: ParallelState) -> Found | None:
    """The newest good checkpoint of --load, else the model of --load-hf; None where training starts anew. Every rank
    calls it.

    Raises:
        CheckpointError: there are some, and none is good; or none, where a flag says what to take from it.
    """
    options = config.checkpoint
    directory = checkpoints.newest_good(options.load, state, options.load_strict) if options.load else None
    if directory is not None:
        return Found(directory, checkpoints.read_manifest(directory), options.finetune)
    if options.load_hf:
        manifest = checkpoints.read_hugging_face(options.load_hf, config.model)
        return Found(Path(options.load_hf), manifest, weights_alone=True)
    if options.load is None:
        return None
    asked = [f"--{name.replace('_', '-')}" for name in OF_A_CHECKPOINT if getattr(options, name)]
    if asked:
        raise CheckpointError(
            f"no checkpoint in {options.load}", f"{asked[0]} takes one", "check --load, or leave it out"
        )
    log.info(f"no checkpoint in {options.load}: training starts anew")
    return None


def data_phases(config: Config, layout: Layout, found: Found | None) -> tuple[Phase, ...]:
    """The phases of this run's data: those of the checkpoint that it resumes, and one more where the flags now name
    other data, another sequence length or another batch size.

    Raises:
        CheckpointError: a checkpoint of weights alone.
        DataError: a corpus that cannot be read, or that has changed since.
    """
    wanted = phase_of(config, layout)
    if found is None or found.weights_alone:
        return (wanted,)
    metadata = found.manifest.metadata
    if "progress" not in metadata:
        rule = "no run has trained it, so there is none to go on with"
        raise CheckpointError(f"{found.directory} holds weights alone", rule, "add --finetune to begin with them")
    stored = from_json(metadata["data"]["phases"])
    progress = Progress(**metadata["progress"])
    if not stored and config.data.data_order != "megatron":
        log.info(
            "its samples so far were in Megatron-LM's order, and all data begins anew: --data-order megatron goes on"
        )
    return go_on(stored, wanted, progress.step, progress.samples, config.data.start_new_epoch)


def resume(training: Training, found: Found | None) -> Progress:
    """Go on from a checkpoint, where there is one.

    Raises:
        CheckpointError: one of another model or seed, or without what is asked of it.
    """
    if found is None:
        return Progress()
    options, directory, manifest = training.config.checkpoint, found.directory, found.manifest
    checkpoints.check_same_model(manifest, training.config.model)
    with_optimizer = not (options.no_load_optim or found.weights_alone)
    if with_optimizer and not manifest.metadata["has_optimizer"]:
        raise CheckpointError(
            f"{directory} holds no optimizer state", "it was saved with --no-save-optim", "add --no-load-optim"
        )
    if not found.weights_alone:
        _check_seed(manifest, training.config)
    held = shards(training, optimizer=with_optimizer)
    checkpoints.load(directory, held, verify_hashes=False, manifest=manifest)  # `find` has verified
    training.optimizer.publish()
    training.replicas.publish()
    progress = Progress() if found.weights_alone else Progress(**manifest.metadata["progress"])
    for part in training.optimizer.parts:
        set_step(part, manifest.metadata["optimizer_steps"] if with_optimizer else 0)
    if with_optimizer and saved_in_fp16(manifest):
        training.loss_scale.resume(manifest.metadata["loss_scale"])
    what = "weights alone" if found.weights_alone else f"step {progress.step}"
    log.info(f"loaded {directory}: {what}, saved by layout {manifest.layout}")
    return progress


def saved_in_fp16(manifest: Manifest) -> bool:
    """Whether the run of a checkpoint had a loss scale."""
    return bool(manifest.metadata["config"]["training"].get("fp16"))


def _check_seed(manifest: Manifest, config: Config) -> None:
    """Refuse to go on with another order and other dropout than the run so far, unless told to."""
    seed = manifest.metadata["rng"]["seed"]
    if seed != config.training.seed and not config.checkpoint.no_load_rng:
        raise CheckpointError(
            f"--seed {config.training.seed} resumes a run of --seed {seed}",
            "the seed orders the samples and draws dropout",
            f"use --seed {seed}, or --no-load-rng to go on with another order from here",
        )
