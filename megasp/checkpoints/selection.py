"""Which checkpoint a run goes on from: the newest whose every byte is as it was written."""

from pathlib import Path

from megasp import log
from megasp.checkpoints.manifest import candidates, unfinished
from megasp.checkpoints.together import Failed, from_rank_0, together
from megasp.checkpoints.verify import damage
from megasp.errors import CheckpointError
from megasp.parallel_state import ParallelState


def newest_good(root: Path | str, state: ParallelState, strict: bool = False) -> Path | None:
    """The newest good checkpoint of a directory, or the one that it is. Every rank calls it; each reads some files.

    Damaged and unfinished ones are named and passed over.

    Args:
        strict: refuse instead of passing over.
    Returns:
        Its directory; None where there is no checkpoint at all.
    Raises:
        CheckpointError: none of those that are there is good; or the newest is not, and `strict`.
    """
    root = Path(root)
    try:
        # Rank 0 looks: another node may see the directory's names of a moment ago.
        looks = together(state, lambda: (candidates(root), unfinished(root)) if state.rank == 0 else ([], []))
    except Failed as failed:
        rule = f"the directory must be readable ({failed})"
        raise CheckpointError(f"--load {root}", rule, "check its permissions") from None
    directories, left = from_rank_0(state, looks[0] if looks else ([], []))
    if left and strict:
        raise _refused(f"{left[-1]} was never finished")
    for path in left if state.rank == 0 else ():
        log.warning(f"{path} was never finished, and does not count")
    for directory in directories:
        problem = _first_problem(directory, state)
        if problem is None:
            return directory
        if strict:
            raise _refused(problem)
        if directory == root:
            raise CheckpointError(problem, "--load names this very checkpoint", "name another one, or their directory")
        if state.rank == 0:
            log.warning(f"{problem}: {directory.name} is passed over for the one before")
    if directories:
        rule = f"of the {len(directories)} that are there none is as it was written"
        raise CheckpointError(f"no good checkpoint in {root}", rule, "see `megasp checkpoint verify`, or load another")
    return None


def _first_problem(directory: Path, state: ParallelState) -> str | None:
    """What is wrong with a checkpoint, on every rank the same; each has read its share of the files."""
    share = slice(state.rank, None, state.layout.world_size)
    parts = together(state, lambda: damage(directory, share))
    return from_rank_0(state, next((problem for part in parts for problem in part), None))


def _refused(got: str) -> CheckpointError:
    rule = "with --load-strict the newest checkpoint must be good"
    return CheckpointError(got, rule, "leave --load-strict out to go on from the one before, or remove it")
