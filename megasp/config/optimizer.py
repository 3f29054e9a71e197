"""Flags of the optimizer and of the learning rate's schedule, with Megatron-LM's names and values."""

from dataclasses import dataclass, replace
from typing import Self

from megasp.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    optimizer: str = flag("adam", "AdamW (decoupled weight decay), as in Megatron-LM", choices=("adam",))
    lr: float | None = flag(None, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate at the end of the decay")
    decoupled_lr: float | None = flag(None, "peak learning rate of embedding and output layer; lr without it")
    decoupled_min_lr: float | None = flag(None, "theirs at the end of the decay; min-lr without it")
    lr_decay_style: str = flag(
        "linear", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(None, "steps until min-lr; train-iters without it")
    lr_decay_samples: int | None = flag(None, "with --train-samples: samples until min-lr; train-samples without it")
    lr_warmup_iters: int = flag(0, "steps of linear warm-up")
    lr_warmup_samples: int = flag(0, "with --train-samples: samples of linear warm-up")
    lr_warmup_fraction: float | None = flag(None, "warm-up as a share of the steps or samples until min-lr")
    lr_warmup_init: float = flag(0.0, "learning rate at the start of the warm-up")
    lr_wsd_decay_style: str = flag(
        "exponential", "shape of WSD's last phase", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = flag(None, "steps of WSD's last phase")
    lr_wsd_decay_samples: int | None = flag(None, "with --train-samples: samples of WSD's last phase")
    weight_decay: float = flag(0.01, "decay of matrices; biases and norm weights are not decayed")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_eps: float = flag(1e-8, "added to the root of the second moment")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0 switches clipping off")

    @property
    def of_ends(self) -> Self:
        """With the rates of embedding and output layer."""
        if self.decoupled_lr is None:
            return self
        low = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        return replace(self, lr=self.decoupled_lr, min_lr=low)

    def schedule(self, length: int) -> tuple[float, int, int]:
        """Lengths of the warm-up, of all until the end of the decay, and of WSD's last phase (0 without one).

        Args:
            length: of the run, `TrainingConfig.length`; all are in its unit.
        """
        decay = self.lr_decay_iters or self.lr_decay_samples or length
        warmup: float = self.lr_warmup_iters or self.lr_warmup_samples
        if self.lr_warmup_fraction is not None:
            warmup = self.lr_warmup_fraction * decay
        return warmup, decay, self.lr_wsd_decay_iters or self.lr_wsd_decay_samples or 0
