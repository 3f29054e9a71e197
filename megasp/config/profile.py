"""Flags of the profilers, with Megatron-LM's names and values, and their rules."""

from dataclasses import dataclass

from megasp.config.flags import flag
from megasp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiling."""

    profile: bool = flag(
        False,
        "profile some steps: under nsys, started with `--capture-range=cudaProfilerApi`, or with "
        "--use-pytorch-profiler",
    )
    profile_step_start: int = flag(10, "steps of the whole run before the first one profiled")
    profile_step_end: int = flag(12, "number of the last step profiled")
    profile_ranks: tuple[int, ...] = flag((0,), "ranks that are profiled", metavar="RANK")
    use_pytorch_profiler: bool = flag(
        False, "profile by PyTorch, without nsys: a trace of each rank in --tensorboard-dir, or else in --save"
    )


def check_profile(options: ProfileConfig, folder: str | None, world_size: int, device: str) -> None:
    """Refuse a profile of nothing, by nothing or to nowhere.

    Args:
        folder: where traces would go.
        device: "cpu" or "cuda".
    """
    if not options.profile:
        if options != ProfileConfig():
            raise ConfigError("options of --profile without it", "they would do nothing", "add --profile")
        return
    first, last = options.profile_step_start, options.profile_step_end
    if first >= last:
        got = f"profile-step-start {first} and profile-step-end {last}"
        raise ConfigError(got, "the steps after the one up to the other are profiled", "end later than you start")
    missing = [rank for rank in options.profile_ranks if not 0 <= rank < world_size]
    if missing or not options.profile_ranks:
        got = f"profile-ranks {' '.join(map(str, options.profile_ranks))} of {world_size} ranks"
        raise ConfigError(got, "these ranks are profiled", f"name ranks of 0 to {world_size - 1}")
    if options.use_pytorch_profiler and folder is None:
        raise ConfigError("--use-pytorch-profiler", "its traces are files", "add --tensorboard-dir DIR")
    if device == "cpu" and not options.use_pytorch_profiler:
        rule = "nsys profiles what runs on a GPU"
        raise ConfigError("--profile on a CPU", rule, "add --use-pytorch-profiler")
