"""Which schedule a pipeline runs, in how many chunks a rank, and what that asks of the number of microbatches."""

from dataclasses import dataclass

from megasp.config.layout_string import count_stages
from megasp.errors import ConfigError

SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zbv", "gpipe")


@dataclass(frozen=True)
class PipelinePlan:
    """A schedule's name and its sizes: P ranks, each with V chunks (virtual stages)."""

    schedule: str = "1f1b"
    ranks: int = 1
    chunks: int = 1

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    @property
    def defers_weight_gradients(self) -> bool:
        """Whether weight gradients are computed apart from the backward."""
        return self.schedule in ("zb-h1", "zbv")

    @classmethod
    def choose(cls, schedule: str | None, ranks: int, chunks: int | None) -> "PipelinePlan":
        """The plan that flags ask for: interleaved where there are several chunks, as in Megatron-LM, else 1f1b.

        Raises:
            ConfigError: the schedule cannot have so many chunks.
        """
        name = schedule or ("interleaved" if (chunks or 1) > 1 else "1f1b")
        if ranks == 1 and (schedule not in (None, "1f1b") or (chunks or 1) > 1):
            raise ConfigError(
                f"pipeline-schedule {name} on pipeline-model-parallel-size 1",
                "one rank has nothing to schedule",
                "leave it out, or use --pipeline-model-parallel-size 2",
            )
        if name == "interleaved" and (chunks or 1) == 1:
            raise ConfigError(
                "pipeline-schedule interleaved with one virtual stage a rank",
                "it interleaves several",
                "add --num-virtual-stages-per-pipeline-rank 2",
            )
        if name == "zbv" and chunks not in (None, 2):
            raise ConfigError(
                f"pipeline-schedule zbv with {chunks} virtual stages a rank",
                "its V has two: down the ranks and up again",
                "use 2, or leave it out",
            )
        if name in ("1f1b", "zb-h1", "gpipe") and (chunks or 1) > 1:
            raise ConfigError(
                f"pipeline-schedule {name} with {chunks} virtual stages a rank",
                "it has one",
                "use --pipeline-schedule interleaved",
            )
        return cls(name, ranks, chunks or (2 if name == "zbv" else 1))

    def check_microbatches(self, microbatches: int) -> None:
        """Refuse a number of microbatches that the schedule cannot run.

        Raises:
            ConfigError: interleaved, and not a multiple of the ranks.
        """
        if self.schedule == "interleaved" and microbatches % self.ranks:
            below = microbatches // self.ranks * self.ranks
            near = " or ".join(str(n) for n in (below, below + self.ranks) if n)
            raise ConfigError(
                f"{microbatches} microbatches on pipeline-schedule interleaved with {self.ranks} ranks",
                "they pass in groups of as many as there are ranks",
                f"use {near} microbatches (global-batch-size / micro-batch-size / data-parallel size)",
            )


def chunks_of(
    ranks: int, num_layers: int, virtual_stages: int | None, layers_per_stage: int | None, layout: str | None
) -> int | None:
    """Stages of each rank, from whichever flags say it; None where none does.

    Raises:
        ConfigError: they disagree, or say no whole number.
    """
    said: dict[str, float] = {}
    if virtual_stages is not None:
        said["--num-virtual-stages-per-pipeline-rank"] = virtual_stages
    if layers_per_stage is not None:
        per_rank = ranks * layers_per_stage
        said["--num-layers-per-virtual-pipeline-stage"] = num_layers / per_rank if per_rank > 0 else 0
    if layout is not None:
        said["--pipeline-model-parallel-layout"] = count_stages(layout) / max(ranks, 1)
    if len(set(said.values())) > 1 or any(n < 1 or n % 1 for n in said.values()):
        raise ConfigError(
            " and ".join(f"{flag} ({n:g} stages a rank)" for flag, n in said.items()),
            f"each of the {ranks} pipeline ranks holds the same whole number of stages",
            "give --num-virtual-stages-per-pipeline-rank alone",
        )
    return int(next(iter(said.values()))) if said else None
