"""Contestants take turns: each lives in processes of its own, and one call of each makes a round.

    round 0   A B C      round 1   B C A      round 2   C A B      ...

A machine that slows down or is shared slows all of a round, so what is reported is ratios within rounds: their median,
smallest and largest. Beside the wall time stands the CPU time (all threads of all ranks), which neighbours disturb
less. Processes are needed because peers patch modules of torch for everybody; between calls they sleep on a pipe.
"""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    Args:
        name: in tables.
        make: importable function; called once in each rank's process (its gloo group is initialized). What it returns
            is timed: a function of the number of the call. Where it has a method `prepare`, that is called before with
            the same number, and not timed.
        args: of `make`.
        ranks: processes.
        threads: compute threads of each.
    """

    name: str
    make: Callable[..., Callable[[int], Any]]
    args: tuple[Any, ...] = ()
    ranks: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Call:
    """One call: wall seconds of the slowest rank, CPU seconds and page faults of all ranks, what rank 0 returned."""

    seconds: float
    cpu_seconds: float
    page_faults: int
    result: Any


class ContestantFailed(Exception):
    """A contestant's process raised; holds its traceback."""


class Team:
    """The running processes of one contestant."""

    def __init__(self, contestant: Contestant, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.contestant = contestant
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(contestant.ranks):
            pipe, far_end = context.Pipe()
            process = context.Process(target=_rank_main, args=(far_end, contestant, rank, folder), daemon=True)
            process.start()
            far_end.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self._replies()  # each says when it is ready

    def call(self, index: int) -> Call:
        """Let all ranks make call `index` together."""
        for pipe in self._pipes:
            pipe.send(index)
        ranks: list[Call] = self._replies()
        seconds, cpu_seconds = max(rank.seconds for rank in ranks), sum(rank.cpu_seconds for rank in ranks)
        return Call(seconds, cpu_seconds, sum(rank.page_faults for rank in ranks), ranks[0].result)

    def peak_gib(self) -> float:
        """Most memory resident since the last call of this (or since the start), all ranks together."""
        for pipe in self._pipes:
            pipe.send("peak")
        return sum(self._replies())

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()

    def _replies(self) -> list[Any]:
        replies = []
        for rank, pipe in enumerate(self._pipes):
            try:
                reply = pipe.recv()
            except EOFError:
                reply = ContestantFailed("its process ended")
            if isinstance(reply, ContestantFailed):
                raise ContestantFailed(f"{self.contestant.name}, rank {rank}: {reply}")
            replies.append(reply)
        return replies


def _rank_main(pipe: Connection, contestant: Contestant, rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from megasp.process_group import use_loopback

    torch.set_num_threads(contestant.threads)
    use_loopback()
    world_size = contestant.ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        call = contestant.make(*contestant.args)
        pipe.send("ready")
        _reset_peak()
        while True:
            index = pipe.recv()
            if index == "peak":
                pipe.send(_peak_gib())
                _reset_peak()
                continue
            if hasattr(call, "prepare"):
                call.prepare(index)
            dist.barrier()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            cpu, start = time.process_time(), time.perf_counter()
            result = call(index)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            pipe.send(Call(seconds, cpu, faults, result if rank == 0 else None))
    except EOFError:
        pass  # the contest is over
    except BaseException:
        pipe.send(ContestantFailed(traceback.format_exc()))
    os._exit(0)  # without the clean-up of groups whose other ranks may be gone


def _reset_peak() -> None:
    """Forget the peak so far (Linux), so that building the model does not count."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Tensors on the GPU where there is one in use, else resident memory of the process."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def started(contestants: Sequence[Contestant]) -> Iterator[list[Team]]:
    """All contestants' processes, one after the other brought to the point where they can be called."""
    with tempfile.TemporaryDirectory(prefix="megasp-contest-") as name, ExitStack() as stack:
        teams = []
        for index, contestant in enumerate(contestants):
            folder = Path(name, str(index))
            folder.mkdir()
            team = Team(contestant, folder)
            stack.callback(team.close)
            teams.append(team)
        yield teams


@dataclass(frozen=True)
class Outcome:
    """All calls of one contestant, warm-up apart."""

    contestant: Contestant
    warmup: list[Call]
    calls: list[Call]
    peak_gib: float

    @property
    def results(self) -> list[Any]:
        """What it returned, warm-up included."""
        return [call.result for call in self.warmup + self.calls]


def play(
    contestants: Sequence[Contestant],
    rounds: int,
    warmup: int,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[Outcome]:
    """Let the contestants take turns, and return their calls.

    Args:
        rounds: timed ones; at least five, so that a median means something.
        warmup: rounds before.
        check: function of {name: result} of a round, which raises where they must not differ.
    """
    with started(contestants) as teams:
        calls: list[list[Call]] = [[] for _ in teams]
        for index in range(warmup + rounds):
            if index == warmup:
                for team in teams:
                    team.peak_gib()
            for turn in range(len(teams)):
                who = (turn + index) % len(teams)
                calls[who].append(teams[who].call(index))
            if check is not None:
                check({team.contestant.name: each[-1].result for team, each in zip(teams, calls, strict=True)})
        return [
            Outcome(team.contestant, each[:warmup], each[warmup:], team.peak_gib())
            for team, each in zip(teams, calls, strict=True)
        ]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def text(self, digits: int = 2) -> str:
        """`1.25 (1.20-1.31)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"

    def json(self) -> list[float]:
        """[median, smallest, largest] to five digits."""
        return [float(f"{value:.5g}") for value in (self.median, self.low, self.high)]


def ratio(of: Outcome, to: Outcome, figure: str = "seconds") -> Spread:
    """`of` / `to` round by round: how many times as long (or as much CPU time) the first took."""
    pairs = zip(of.calls, to.calls, strict=True)
    return Spread.of([getattr(a, figure) / getattr(b, figure) for a, b in pairs])


def table(outcomes: Sequence[Outcome], work: tuple[str, float] | None = None) -> str:
    """A Markdown table: times of every contestant, and each one's time in units of the first's.

    Args:
        work: what a call does, as a unit and an amount: ("tokens", 2048) adds a column of tokens/s.
    """
    speed = f" {work[0]}/s |" if work else ""
    lines = [
        f"| contestant | ms a call |{speed} CPU ms | wall, x ours | CPU, x ours | page faults | peak GiB |",
        "|---" * (7 + bool(work)) + "|",
    ]
    for outcome in outcomes:
        seconds = Spread.of([call.seconds for call in outcome.calls])
        cpu = Spread.of([call.cpu_seconds for call in outcome.calls])
        faults = statistics.median(call.page_faults for call in outcome.calls)
        rate = f" {work[1] / seconds.median:,.0f} |" if work else ""
        lines.append(
            f"| {outcome.contestant.name} | {seconds.scaled(1e3).text(1)} |{rate} {cpu.scaled(1e3).text(1)} "
            f"| {ratio(outcome, outcomes[0]).text()} | {ratio(outcome, outcomes[0], 'cpu_seconds').text()} "
            f"| {faults:,.0f} | {outcome.peak_gib:.2f} |"
        )
    return "\n".join(lines)


def record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The same figures for a JSON line: [median, smallest, largest] each."""
    return {
        outcome.contestant.name: {
            "ms": Spread.of([1e3 * call.seconds for call in outcome.calls]).json(),
            "cpu_ms": Spread.of([1e3 * call.cpu_seconds for call in outcome.calls]).json(),
            "wall_ratio": ratio(outcome, outcomes[0]).json(),
            "cpu_ratio": ratio(outcome, outcomes[0], "cpu_seconds").json(),
            "page_faults": statistics.median(call.page_faults for call in outcome.calls),
            "peak_gib": float(f"{outcome.peak_gib:.4g}"),
        }
        for outcome in outcomes
    }
