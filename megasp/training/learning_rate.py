"""The learning rate as a pure function of the step: Megatron-LM's schedules, without state."""

import math

from megasp.config.schema import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, train_steps: int) -> float:
    """The rate for the step that follows `step` finished ones; the first step of a run is 0.

    So the first step of a warm-up runs at `lr_warmup_init`, and the step after `warmup` finished ones at the peak. It
    is what Megatron-LM trains with. (The rate that its log line of an iteration shows is the next iteration's.)

        warm-up              lr_warmup_init -> lr, straight
        constant             lr
        linear, cosine       lr -> min_lr, between the warm-up and decay_steps
        inverse-square-root  lr x sqrt(warm-up / step), not below min_lr; without warm-up lr / sqrt(step)
        WSD                  lr, and in the last lr_wsd_decay_iters steps lr -> min_lr
        later                min_lr (but constant stays)

    decay_steps is `lr_decay_iters`, or `train_steps` without it. Equals megatron.core.optimizer_param_scheduler to the
    last bit, counted in iterations; Megatron-LM itself counts samples, which differs in one case only:
    inverse-square-root without warm-up, whose rate there depends on the batch size.

    Example: `learning_rate(5, OptimizerConfig(lr=1e-3, lr_warmup_iters=10), train_steps=100)` is 5e-4.
    """
    assert config.lr is not None, "lr is not known yet"
    peak, low = config.lr, config.min_lr
    decay_steps = config.lr_decay_iters or train_steps
    warmup: float = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * decay_steps
    if warmup > 0 and step <= warmup:
        return config.lr_warmup_init + (peak - config.lr_warmup_init) * step / warmup
    if config.lr_decay_style == "constant":
        return peak
    if step > decay_steps:
        return low
    if config.lr_decay_style == "inverse-square-root":
        return max(low, peak * max(warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    start, style = warmup, config.lr_decay_style
    if config.lr_decay_style == "WSD":
        assert config.lr_wsd_decay_iters, "lr_wsd_decay_iters is required"
        start, style = decay_steps - config.lr_wsd_decay_iters, config.lr_wsd_decay_style
    if step <= start:
        return low + (peak - low)
    return low + _decay(style, (step - start) / (decay_steps - start)) * (peak - low)


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
