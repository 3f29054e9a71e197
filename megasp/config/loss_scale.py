"""Flags of the loss scale of --fp16, with Megatron-LM's names and values."""

from dataclasses import dataclass

from megasp.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Loss scale of --fp16."""

    loss_scale: float | None = flag(None, "constant loss scale; a dynamic one without it")
    initial_loss_scale: float | None = flag(None, "first dynamic loss scale; 2^32 without it")
    min_loss_scale: float | None = flag(None, "smallest dynamic loss scale; 1 without it")
    loss_scale_window: int | None = flag(
        None, "steps without an overflow after which the loss scale doubles; 1000 without it"
    )
    hysteresis: int | None = flag(None, "overflows before the loss scale is halved; 2 without it")

    @property
    def initial(self) -> float:
        return self.loss_scale or self.initial_loss_scale or 2.0**32

    @property
    def smallest(self) -> float:
        return self.loss_scale or self.min_loss_scale or 1.0

    @property
    def window(self) -> int:
        return self.loss_scale_window or 1000

    @property
    def overflows(self) -> int:
        """Overflows before the scale is halved."""
        return self.hysteresis or 2
