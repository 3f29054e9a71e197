"""The learning rate as a pure function of how far the run is: Megatron-LM's schedules, without state."""

import math

from megasp.config.schema import OptimizerConfig


def learning_rate(done: int, config: OptimizerConfig, length: int) -> float:
    """The rate of the step that begins when `done` of the run's `length` is behind it; a run begins at 0.

    Both are samples with --train-samples, and steps with --train-iters, as all of the schedule (`TrainingConfig.done`,
    `TrainingConfig.length`). With a batch that grows (--rampup-batch-size) they are different curves.

    The first step of a warm-up runs at `lr_warmup_init`, and the step that begins at its end at the peak. It is what
    Megatron-LM trains with. (The rate that its log line of an iteration shows is the next iteration's.)

        warm-up              lr_warmup_init -> lr, straight
        constant             lr
        linear, cosine       lr -> min_lr, from the warm-up to the end of the decay
        inverse-square-root  lr x sqrt(warm-up / done), not below min_lr; without warm-up lr / sqrt(done)
        WSD                  lr, and in its last phase lr -> min_lr
        later                min_lr (but constant stays)

    The decay ends at `lr_decay_iters` or `lr_decay_samples`, or with the run. Equals
    megatron.core.optimizer_param_scheduler to the last bit. With --train-iters Megatron-LM counts samples, too, a batch
    a step, which differs in one case only: inverse-square-root without warm-up, whose rate there depends on the batch.

    Example: `learning_rate(5, OptimizerConfig(lr=1e-3, lr_warmup_iters=10), length=100)` is 5e-4.
    """
    assert config.lr is not None, "lr is not known yet"
    peak, low = config.lr, config.min_lr
    warmup, end, last = config.schedule(length)
    if warmup > 0 and done <= warmup:
        return config.lr_warmup_init + (peak - config.lr_warmup_init) * done / warmup
    if config.lr_decay_style == "constant":
        return peak
    if done > end:
        return low
    if config.lr_decay_style == "inverse-square-root":
        return max(low, peak * max(warmup, 1) ** 0.5 / max(done, 1) ** 0.5)
    start, style = warmup, config.lr_decay_style
    if config.lr_decay_style == "WSD":
        assert last, "WSD's last phase has a length"
        start, style = end - last, config.lr_wsd_decay_style
    if done <= start:
        return low + (peak - low)
    return low + _decay(style, (done - start) / (end - start)) * (peak - low)


def learning_rates(done: int, config: OptimizerConfig, length: int) -> tuple[float, float | None]:
    """`learning_rate`, and that of embedding and output layer where they have their own (--decoupled-lr)."""
    ends = learning_rate(done, config.of_ends, length) if config.decoupled_lr is not None else None
    return learning_rate(done, config, length), ends


def _decay(style: str, ratio: float) -> float:
    """What is left of 1 after a share `ratio` (0 to 1) of the decay."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":  # half-life of one whole decay, stretched to end at 0
        return 2.0 * math.pow(0.5, ratio) - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(ratio)
