"""Say what each rank will hold, by component, before anything runs.

The account is a closed form of the run's flags. A pipeline action such as 0B3 (stage 0, backward of microbatch 3) names
the fullest moment. Beside the sum a GPU holds its context, the libraries' workspaces and what its allocator cannot use:
some 1 to 3 GB. With --dry-run the real build and step run on tensors without memory, and every byte is counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megasp import dry_run, log
from megasp.config.context_parallel import split_context
from megasp.config.flags import flag
from megasp.config.layout import Layout
from megasp.config.load import load, parser, to_yaml
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.training.datasets import resolve
from megasp.training.memory import account, by_component, layer_table, table

DEFAULTS = {"train_iters": 1, "lr": 1e-4, "mock_data": True}
"""What a run must say and memory does not depend on."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Memory."""

    world: int | None = flag(None, "ranks; as few as the parallel sizes make without it")
    dry_run: bool = flag(False, "count beside it what the real step allocates, on tensors without memory")


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    flags = parser(prog, __doc__ or "", [Options])
    config, source, options, notes = load(argv, flags, Options, DEFAULTS)
    if source.print_config:
        print(to_yaml(config), end="")
        return 0
    for note in notes:
        log.info(note)
    config = resolve(config)
    layout = validate(config, options.world or smallest_world(config), "cuda")
    print("\n".join(report(config, layout, options.dry_run)))
    return 0


def smallest_world(config: Config) -> int:
    """The ranks of one model replica."""
    parallel, context = config.parallel, split_context(config)
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, context.ulysses, context.ring
    return math.prod(sizes)


def report(config: Config, layout: Layout, counted: bool = False) -> list[str]:
    """The account of every pipeline rank, for a person."""
    accounts = [account(config, layout, rank) for rank in range(layout.pp)]
    measured, parts = {}, []
    if counted:
        counts = [dry_run.count(config, layout, each.rank) for each in log.progress(accounts, "dry run", layout.pp)]
        measured["counted by a dry run"] = [each.peak for each in counts]
        parts = [
            "counted at that moment, messages among the activations:",
            *by_component([each.parts for each in counts]),
        ]
        if any(each.on_host for each in counts):
            measured["the host's, counted"] = [each.on_host for each in counts]
    reason = split_context(config).reason
    return [
        f"layout {layout.name}: {layout.describe()}",
        *([f"context parallel {layout.cp}: {reason}"] if reason else []),
        "held by a rank at the fullest moment of a step:",
        *table(accounts, measured),
        *parts,
        f"kept by a layer of a microbatch of {accounts[0].tokens} tokens on a rank:",
        *layer_table(accounts[0]),
    ]
