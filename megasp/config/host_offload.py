"""Weights and optimizer in the host's memory: the flags and their rules. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megasp.config.flags import flag
from megasp.errors import ConfigError

if TYPE_CHECKING:
    from megasp.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class HostOffloadConfig:
    """Offload to the host."""

    optimizer_cpu_offload: bool = flag(
        False, "keep master weights and both moments in the host's memory, and run the optimizer's step there"
    )
    optimizer_offload_fraction: float = flag(1.0, "share of the weights for which --optimizer-cpu-offload does so")
    cpu_offloading_weights: bool = flag(
        False,
        "with ZeRO-3 and --optimizer-cpu-offload: keep the shards of weights and gradients in the host's memory, too, "
        "and fetch a layer's before they are gathered",
    )

    @property
    def moved_share(self) -> float:
        """Share of the weights whose optimizer runs on the host."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

    @property
    def optimizer_share(self) -> float:
        """Share of the weights whose masters and moments are on the host beside weights on the device."""
        away = self.optimizer_cpu_offload and not self.cpu_offloading_weights
        return self.optimizer_offload_fraction if away else 0.0


def check(config: "Config", device: str) -> None:
    """Refuse options that contradict each other or do nothing, and offloading on a CPU.

    Raises:
        ConfigError: the first of them.
    """
    options, parallel = config.offload, config.parallel
    if options.optimizer_offload_fraction != 1 and not options.optimizer_cpu_offload:
        raise ConfigError(
            f"--optimizer-offload-fraction {options.optimizer_offload_fraction:g} without --optimizer-cpu-offload",
            "nothing is offloaded",
            "add --optimizer-cpu-offload, or leave it out",
        )
    if options.cpu_offloading_weights:
        if parallel.zero_stage != 3:
            raise ConfigError(
                f"--cpu-offloading-weights with --data-parallel-sharding-strategy "
                f"{parallel.data_parallel_sharding_strategy}",
                "it is ZeRO-3 that gathers a layer's weights before the layer runs and lets them go behind it",
                "add --data-parallel-sharding-strategy optim_grads_params, or use --optimizer-cpu-offload alone",
            )
        if not options.optimizer_cpu_offload or options.optimizer_offload_fraction != 1:
            raise ConfigError(
                "--cpu-offloading-weights without all of the optimizer on the host",
                "a weight's step runs where the weight is",
                "add --optimizer-cpu-offload, without --optimizer-offload-fraction",
            )
    backend = config.kernels.optimizer_backend
    if options.moved_share == 1 and backend in ("apex", "transformer-engine"):
        raise ConfigError(
            f"--optimizer-backend {backend} with all of the optimizer on the host",
            "the step there is PyTorch's",
            "leave --optimizer-backend out, or use a smaller --optimizer-offload-fraction",
        )
    if options.optimizer_cpu_offload and device == "cpu":
        raise ConfigError(
            "--optimizer-cpu-offload on a CPU", "everything is in the host's memory there as it is", "leave it out"
        )
