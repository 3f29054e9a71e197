"""`megasp verify --collectives`: does every rank communicate in an order that the others share?

Builds ranks of a layout of any size one after another in this process, under PyTorch's fake process group, runs the
real training step on each, and records what it asks of which group. Then it replays all ranks together: a collective
needs every member at the same operation, dtype and size; a message must have been sent before it is waited for. If the
replay comes to its end, the wait graph has no cycle. So a layout that would hang a cluster is found here.

Ranks differ by their coordinates alone, so of a large layout only some pipelines are replayed: those at the first and
the last index of each other axis, with all their ranks.
"""

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megasp import log, parallel_state
from megasp.config.layout import AXES, Layout
from megasp.config.schema import Config
from megasp.pipeline.schedules import Action
from megasp.training.build import Training, build
from megasp.training.datasets import build_datasets, build_loader
from megasp.training.step import train_step

DEFAULTS = {
    "hidden_size": 32, "kv_channels": 2, "num_attention_heads": 64, "num_query_groups": 8, "seq_length": 64,
    "global_batch_size": 16,
}  # fmt: skip
"""What differs from `megasp.verify.DEFAULTS`: enough of everything for tp8-pp8-u8."""

POINT_TO_POINT = ("send", "recv_", "wait")


class OrderError(Exception):
    """Ranks that would hang, or mix up what they exchange; says which, at which operation."""


@dataclass(frozen=True)
class Event:
    """One operation on a group; a wait for a message carries its number on its link in place of a size."""

    operation: str
    group: str
    ranks: tuple[int, ...]
    dtype: str = ""
    size: int = 0

    def __str__(self) -> str:
        return f"{self.operation} {self.dtype}[{self.size}] over ranks {list(self.ranks)}"


class _Record(TorchDispatchMode):
    """Keeps every operation on a process group that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            schema = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            group = dist.ProcessGroup.unbox(schema["process_group"])
            tensor = next(x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor))
            name = func._schema.name.removeprefix("c10d::")
            ranks = tuple(dist.get_process_group_ranks(group))
            self.events.append(Event(name, group.group_name, ranks, str(tensor.dtype)[6:], tensor.numel()))
        return func(*args, **(kwargs or {}))


def record(config: Config, layout: Layout, rank: int) -> list[Event]:
    """What one rank of the layout asks of its groups in a training step."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        training = build(config, parallel_state.build(layout, torch.device("cpu")))
        with build_loader(config, training.state, training.shards, build_datasets(config).train) as loader:
            batches = loader.step()
        with _Record() as recorded:
            _watch(training, len(batches), recorded.events)
            train_step(training, batches, 0.0)
        return recorded.events
    finally:
        dist.destroy_process_group()


def _watch(training: Training, microbatches: int, events: list[Event]) -> None:
    """Note in `events` when an action has waited for its message."""
    schedule, rank, links = training.pipeline.schedule(microbatches), training.state.pp.rank, training.state.links
    numbers = {action: (edge, n) for edge, sent in schedule.messages.items() for n, action in enumerate(sent)}

    def watch(event: str, action: Action) -> None:
        if event == "start" and action in numbers:
            edge, number = numbers[action]
            assert edge[1] == rank
            group = links[edge].group
            assert group is not None
            events.append(Event("wait", group.group_name, tuple(dist.get_process_group_ranks(group)), size=number))

    training.pipeline.watch = watch


def some_ranks(layout: Layout) -> list[int]:
    """The ranks of the pipelines at the first and the last index of every axis but pp."""
    ends = [
        range(size) if axis == "pp" else sorted({0, size - 1}) for axis, size in zip(AXES, layout.sizes, strict=True)
    ]
    return sorted(layout.rank(dict(zip(AXES, index, strict=True))) for index in itertools.product(*ends))


def replay(recorded: dict[int, list[Event]]) -> None:
    """Run all ranks' events together.

    Raises:
        OrderError: members of a group disagree, or ranks wait for one another for ever.
    """
    _check_messages(recorded)
    rows = {rank: deque(events) for rank, events in recorded.items()}
    sent: Counter[str] = Counter()
    ready = deque(rows)
    stuck: set[int] = set()
    while ready:
        rank = ready.popleft()
        row, moved = rows[rank], False
        while row:
            event = row[0]
            if event.operation == "wait" and sent[event.group] <= event.size:
                break
            members = [rank]
            if event.operation not in POINT_TO_POINT:
                members = [member for member in event.ranks if member in rows]
                others = [rows[member][0] if rows[member] else None for member in members]
                if any(other is None or other.group != event.group for other in others):
                    break
                if len(set(others)) > 1:
                    said = ", ".join(f"rank {m}: {e}" for m, e in zip(members, others, strict=True))
                    raise OrderError(f"members of a group do not do the same: {said}")
            sent[event.group] += event.operation == "send"
            for member in members:
                rows[member].popleft()
            moved = True
        if row:
            stuck.add(rank)
        if moved:
            ready.extend(stuck - {rank} - set(ready))
            stuck &= {rank} if row else set()
    left = [f"rank {rank}: {row[0]}" for rank, row in rows.items() if row]
    if left:
        raise OrderError(f"ranks wait for one another: {'; '.join(left[:8])}")


def _check_messages(recorded: dict[int, list[Event]]) -> None:
    """On each link the receives are of the sizes of the sends, in their order."""
    links: dict[str, dict[str, list[Event]]] = {}
    for events in recorded.values():
        for event in events:
            if event.operation in ("send", "recv_"):
                plain = replace(event, operation="message")
                links.setdefault(event.group, {"send": [], "recv_": []})[event.operation].append(plain)
    for link in links.values():
        if link["send"] != link["recv_"]:
            first = (link["send"] or link["recv_"])[0]
            raise OrderError(
                f"{len(link['send'])} sends and {len(link['recv_'])} receives between ranks {list(first.ranks)} differ"
            )


def check(config: Config, layout: Layout, ranks: Sequence[int] | None = None) -> str:
    """Record and replay a layout; one line about what agreed.

    Raises:
        OrderError: it would hang.
    """
    torch.set_num_threads(1)  # these tensors are tiny
    chosen = list(ranks if ranks is not None else some_ranks(layout))
    recorded = {
        rank: record(config, layout, rank) for rank in log.progress(chosen, layout.name, len(chosen), unit="rank")
    }
    replay(recorded)
    operations = sum(event.operation != "wait" for events in recorded.values() for event in events)
    groups = len({event.group for events in recorded.values() for event in events})
    which = "all" if len(chosen) == layout.world_size else f"{len(chosen)} (whole pipelines at the corners) of"
    return (
        f"{layout.name:20} ok  {config.pipeline.schedule}: {which} {layout.world_size} ranks, "
        f"{operations:,} operations on {groups} groups agree, no cycle of waits"
    )
