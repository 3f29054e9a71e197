"""How the blocks of a split attention reach the ranks, as data: per step what each rank computes, and what travels.

A task is "the queries of owner q with the keys of owner k, on this rank"; each pair of owners that have a block is
exactly one task, done by one rank. A schedule is a list of steps. Messages of a step are on their way while its tasks
run and are there when the next step begins, so every transfer has a step of computation to hide behind. Forward:

    kv    keys and values of their owner          q     queries, to a rank that computes for their owner
    out   partial output and lse, home again

and in the backward kv as before, `q` with the output and its gradient, and home again dkv and dq (partial sums, fp32).

    ring          kv travels from neighbour to neighbour, dkv one step behind it (arXiv 2310.01889)
    lightseq      kv goes straight to who needs it; ranks that have less to do compute for others (arXiv 2310.03294),
                  for any number of ranks, any shards and any documents
    all_gather    kv goes straight to everybody who needs it, one group of heads after another (arXiv 2407.21783)

Pairs of owners without a block (causality, documents, window) are neither computed nor sent.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

KV, Q, OUT, DKV, DQ = "kv", "q", "out", "dkv", "dq"

Pairs = Mapping[tuple[int, int], int]
"""(owner of queries, owner of keys) that have a block -> (query, key) pairs that see each other."""


class Task(NamedTuple):
    """`rank` computes the attention of q's queries to k's keys, for one part of the heads."""

    rank: int
    q: int
    k: int
    part: int = 0


class Message(NamedTuple):
    """What `source` sends to `target`: something of `owner`'s, for one part of the heads."""

    what: str
    owner: int
    source: int
    target: int
    part: int = 0


class Step(NamedTuple):
    """Tasks of all ranks, and messages that travel meanwhile."""

    tasks: tuple[Task, ...]
    messages: tuple[Message, ...]


class Schedule(NamedTuple):
    """Steps of the forward and of the backward. Heads are done in `parts` equal groups of kv heads."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    parts: int = 1


def _steps(tasks: dict[int, list[Task]], messages: dict[int, list[Message]]) -> tuple[Step, ...]:
    """Steps 0 ... to the last that has anything."""
    count = 1 + max([0, *(t for by_step in (tasks, messages) for t, items in by_step.items() if items)])
    return tuple(Step(tuple(sorted(tasks.get(t, []))), tuple(sorted(messages.get(t, [])))) for t in range(count))


def ring(ranks: int, pairs: Pairs, parts: int = 1) -> Schedule:
    """kv of owner k is at rank k + t in step t, and goes on as long as a rank ahead needs it.

    dkv starts at the first rank that computed some, follows one step behind kv, and from the last rank goes home; what
    the owner itself computed never leaves it. So dense causal dkv makes as many hops as kv, ranks - 1.
    """
    tasks: dict[int, list[Task]] = {t: [] for t in range(ranks)}
    out: dict[int, list[Message]] = {t: [] for t in range(ranks + 1)}
    home: dict[int, list[Message]] = {t: [] for t in range(ranks + 1)}
    for k in range(ranks):
        steps = sorted((q - k) % ranks for q, owner in pairs if owner == k)
        for t in steps:
            tasks[t].append(Task((k + t) % ranks, (k + t) % ranks, k))
        far = [t for t in steps if t > 0]
        for t in range(far[-1] if far else 0):
            out[t].append(Message(KV, k, (k + t) % ranks, (k + t + 1) % ranks))
        for t in range(far[0], far[-1] + 1) if far else ():
            target = k if t == far[-1] else (k + t + 1) % ranks
            home[t + 1].append(Message(DKV, k, (k + t) % ranks, target))
    return Schedule(_steps(tasks, out), _steps(tasks, {t: out.get(t, []) + home[t] for t in home}))


def lightseq(ranks: int, pairs: Pairs, parts: int = 1) -> Schedule:
    """In step 0 a rank does its own queries with its own keys, then one other pair of owners a step: its own queries
    with keys that come to it, or as a helper (`_helped`) queries that come to it with its own keys. Every rank does its
    largest tasks first, so that large ones of all ranks meet in a step: no other order of the same tasks is shorter.

    Contiguous shards of one document give the paper's ranks // 2 + 1 steps, for any number of ranks. All ranks are busy
    in all of them (for an even number, half of them in the last):

        5 ranks            step 0   step 1   step 2
        rank 0             0 <- 0   4 <- 0*  3 <- 0*        * computed for another rank
        rank 1             1 <- 1   1 <- 0   4 <- 1*
        rank 2             2 <- 2   2 <- 1   2 <- 0
        rank 3             3 <- 3   3 <- 2   3 <- 1
        rank 4             4 <- 4   4 <- 3   4 <- 2
    """
    tasks: dict[int, list[Task]] = {}
    out: dict[int, list[Message]] = {}
    back: dict[int, list[Message]] = {}
    result: dict[int, list[Message]] = {}
    helped = _helped(ranks, pairs)
    todo: list[list[Task]] = [[] for _ in range(ranks)]
    for q, k in pairs:
        rank = k if (q, k) in helped else q
        todo[rank].append(Task(rank, q, k))

    def order(task: Task) -> tuple[bool, int, int]:
        distance = abs(task.q - task.k)
        return task.q != task.k, -pairs[task.q, task.k], distance if task.rank == task.q else ranks - distance

    for mine in todo:
        for t, task in enumerate(sorted(mine, key=order)):
            rank, q, k, _ = task
            tasks.setdefault(t, []).append(task)
            if rank != k:
                out.setdefault(t - 1, []).append(Message(KV, k, k, q))
                back.setdefault(t + 1, []).append(Message(DKV, k, q, k))
            elif rank != q:
                out.setdefault(t - 1, []).append(Message(Q, q, q, k))
                result.setdefault(t + 1, []).append(Message(OUT, q, k, q))
                back.setdefault(t + 1, []).append(Message(DQ, q, k, q))
    return Schedule(_steps(tasks, _merged(out, result)), _steps(tasks, _merged(out, back)))


def _helped(ranks: int, pairs: Pairs) -> set[tuple[int, int]]:
    """The pairs that the owner of the keys computes for the owner of the queries.

    The busiest rank gives away the task that leaves its helper with least to do, of equal ones the furthest, for as
    long as the helper has less to do then than the busiest rank had.
    """
    own: list[list[int]] = [[] for _ in range(ranks)]  # owners of the keys of a rank's tasks that it may give away
    load = [0] * ranks
    for (q, k), work in pairs.items():
        load[q] += work
        if q != k:
            own[q].append(k)
    helped: set[tuple[int, int]] = set()
    while True:
        busiest = max(range(ranks), key=lambda rank: (load[rank], rank))
        after = [(load[k] + pairs[busiest, k], -abs(busiest - k), k) for k in own[busiest]]
        if not after or min(after)[0] >= load[busiest]:
            return helped
        helper = min(after)[2]
        own[busiest].remove(helper)
        helped.add((busiest, helper))
        load[busiest] -= pairs[busiest, helper]
        load[helper] += pairs[busiest, helper]


def all_gather(ranks: int, pairs: Pairs, parts: int = 1) -> Schedule:
    """Step t: keys of head group t travel, while a rank does its own keys of group t and all others' of group t - 1."""
    tasks: dict[int, list[Task]] = {}
    out: dict[int, list[Message]] = {}
    back: dict[int, list[Message]] = {}
    for q, k in pairs:
        for part in range(parts):
            tasks.setdefault(part if q == k else part + 1, []).append(Task(q, q, k, part))
            if q != k:
                out.setdefault(part, []).append(Message(KV, k, k, q, part))
                back.setdefault(part + 2, []).append(Message(DKV, k, q, k, part))
    return Schedule(_steps(tasks, out), _steps(tasks, _merged(out, back)), parts)


def _merged(*messages: dict[int, list[Message]]) -> dict[int, list[Message]]:
    return {t: [m for some in messages for m in some.get(t, [])] for t in set().union(*messages)}


SCHEDULES: dict[str, Callable[..., Schedule]] = {"p2p": ring, "lightseq": lightseq, "all_gather": all_gather}
"""By the names of --cp-comm-type, of the ring axis."""


def simulate(steps: Iterable[Step], ranks: int, work: Callable[[Task], float]) -> tuple[float, float]:
    """(time, balance) when every step lasts as long as its busiest rank and transfers are hidden.

    Balance is the mean load of a rank over that time: 1 when no rank ever waits.
    """
    total = time = 0.0
    for step in steps:
        load = [sum(work(task) for task in step.tasks if task.rank == rank) for rank in range(ranks)]
        total, time = total + sum(load), time + max(load)
    return time, (total / ranks / time if time else 1.0)


def draw(steps: Iterable[Step], ranks: int) -> str:
    """A line per rank, a column per step: `3 <- 1` is queries of 3 with keys of 1, `*` computed for another rank."""

    def cell(step: Step, rank: int) -> str:
        done = [f"{task.q} <- {task.k}{'*' * (task.q != rank)}" for task in step.tasks if task.rank == rank]
        return ", ".join(dict.fromkeys(done)) or "-"

    table = [[cell(step, rank) for step in steps] for rank in range(ranks)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rows = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(f"rank {rank:<3} {row.rstrip()}" for rank, row in enumerate(rows))
