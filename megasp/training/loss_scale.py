"""The loss scale of fp16 (arXiv 1710.03740 section 3.2): gradients below fp16's 6e-8 would be lost, so the loss is
multiplied by a large number before the backward, and the gradients are divided by it after.

Too large a scale overflows to infinity. Such a step is skipped; the scale is halved when that has happened a few times,
and doubled after a thousand steps without it. These are Megatron-LM's rules.
"""

from dataclasses import dataclass

from megasp.config.schema import Config


@dataclass
class LossScale:
    """The scale, and when it changes. Of bf16 and fp32 it is constantly 1.

    Attributes:
        scale: the number of now.
        smallest: it is never less.
        window: steps without an overflow after which it doubles; None for a constant scale.
        hysteresis: overflows before it is halved, counted anew when it doubles.
        good_steps: since the last overflow or doubling.
        overflows_left: until it is halved.
    """

    scale: float = 1.0
    smallest: float = 1.0
    window: int | None = None
    hysteresis: int = 1
    good_steps: int = 0
    overflows_left: int = 1

    @classmethod
    def of(cls, config: Config) -> "LossScale":
        """The scale that a run begins with."""
        flags = config.loss_scaling
        if not config.training.fp16:
            return cls()
        window = None if flags.loss_scale is not None else flags.window
        return cls(flags.initial, flags.smallest, window, flags.overflows, 0, flags.overflows)

    @property
    def can_fall(self) -> bool:
        """Whether a step that overflows may succeed with a smaller scale."""
        return self.window is not None and self.scale > self.smallest

    def update(self, overflow: bool) -> None:
        """After each step: whether its gradients were not finite."""
        if self.window is None:
            return
        if overflow:
            self.good_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.smallest)
        else:
            self.good_steps += 1
            if self.good_steps == self.window:
                self.good_steps, self.overflows_left = 0, self.hysteresis
                self.scale *= 2

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows_left": self.overflows_left}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from what a checkpoint kept; a constant scale is that of this run's flags."""
        if self.window is not None:
            self.scale = max(state["scale"], self.smallest)
            self.good_steps, self.overflows_left = int(state["good_steps"]), int(state["overflows_left"])
