"""The rules of the learning rate's schedule."""

from megasp.config.schema import Config, OptimizerConfig
from megasp.errors import ConfigError

PHASES = ("lr_decay", "lr_warmup", "lr_wsd_decay")
"""Each has a length in steps (`_iters`) and one in samples (`_samples`)."""


def check_schedule(config: Config) -> None:
    """Refuse lengths that contradict each other, or that count something else than the run does, and rates below
    those they end at."""
    training, optimizer = config.training, config.optimizer
    unit, other = ("samples", "iters") if training.train_samples else ("iters", "samples")
    for phase in PHASES:
        given = getattr(optimizer, f"{phase}_{other}")
        if given:
            name = phase.replace("_", "-")
            rule = "the schedule counts what says how long to train: samples with --train-samples, else steps"
            got, fix = f"--{name}-{other} {given} with --train-{unit}", f"use --{name}-{unit}, or --train-{other}"
            raise ConfigError(got, rule, fix)
    if optimizer.lr_warmup_fraction is not None and getattr(optimizer, f"lr_warmup_{unit}"):
        raise ConfigError(f"--lr-warmup-fraction and --lr-warmup-{unit}", "they say the same", "leave one out")
    _rates(optimizer)
    _lengths(config, "samples" if training.train_samples else "steps")


def _rates(optimizer: OptimizerConfig) -> None:
    ends, decoupled = optimizer.of_ends, "decoupled-" if optimizer.decoupled_lr is not None else ""
    low = decoupled if optimizer.decoupled_min_lr is not None else ""
    for flag, value, peak, name in (
        ("min-lr", optimizer.min_lr, optimizer.lr, "lr"),
        (f"{low}min-lr", ends.min_lr, ends.lr, f"{decoupled}lr"),
        ("lr-warmup-init", optimizer.lr_warmup_init, optimizer.lr, "lr"),
        ("lr-warmup-init", optimizer.lr_warmup_init, ends.lr, f"{decoupled}lr"),
    ):
        if value > (peak or 0):
            raise ConfigError(f"{flag} {value} and {name} {peak}", f"it is at most {name}", f"lower --{flag}")


def _lengths(config: Config, unit: str) -> None:
    optimizer = config.optimizer
    warmup, decay, last = optimizer.schedule(config.training.length)
    if warmup >= decay:
        raise ConfigError(
            f"a warm-up of {warmup:g} {unit} and a decay that ends at {unit.removesuffix('s')} {decay}",
            "the warm-up must end before the decay does",
            "shorten the warm-up",
        )
    if last > decay - warmup:
        raise ConfigError(
            f"a last phase of WSD of {last} {unit} of {decay - warmup:g} after the warm-up",
            "it lies within them",
            "shorten it",
        )
    if optimizer.lr_decay_style == "WSD" and not last:
        unit = "samples" if unit == "samples" else "iters"
        raise ConfigError("--lr-decay-style WSD", "its last phase has a length", f"give --lr-wsd-decay-{unit}")
