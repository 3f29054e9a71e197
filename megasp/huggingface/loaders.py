"""Ranks that share a sequence read the same samples, whoever makes the loader: Trainer, or a loop with Accelerate.

Accelerate gives every rank samples of its own when it prepares a loader. For a loader whose collator shards sequences
the ranks that read different samples are those of `dp`, so `Accelerator.prepare_data_loader` is followed by setting the
number and index of readers, as Trainer itself does for loaders that it shards. Other loaders are as they were.
(Accelerate's names stand here alone.)
"""

from functools import wraps
from typing import Any

from megasp.errors import ConfigError
from megasp.huggingface.batches import ShardingCollator


def share_samples() -> None:
    """Let loaders that Accelerate prepares from now on give each group of ranks its own samples; no-op without it."""
    try:
        from accelerate import Accelerator
    except ImportError:
        return
    original = Accelerator.prepare_data_loader
    if getattr(original, "shares_samples", False):
        return

    @wraps(original)
    def prepare_data_loader(self: Any, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, data_loader, *args, **kwargs)
        collator = _sharding(getattr(data_loader, "collate_fn", None))
        if collator is not None:
            _read_by_group(prepared, collator)
        return prepared

    prepare_data_loader.shares_samples = True  # type: ignore[attr-defined]
    Accelerator.prepare_data_loader = prepare_data_loader


def _sharding(collate: Any) -> ShardingCollator | None:
    """The sharding collator that a loader calls, also where Trainer has wrapped it."""
    while collate is not None and not isinstance(collate, ShardingCollator):
        collate = getattr(collate, "data_collator", None)
    return collate


def _read_by_group(loader: Any, collator: ShardingCollator) -> None:
    from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard

    if isinstance(loader, DataLoaderDispatcher):
        raise ConfigError(
            "dispatch_batches with sequence parallelism",
            "rank 0 would deal the rows of its own shard out to all ranks",
            "set dispatch_batches to False (Trainer: accelerator_config={'dispatch_batches': False})",
        )
    kinds = BatchSamplerShard | IterableDatasetShard
    readers = [reader for reader in (loader.batch_sampler, loader.dataset) if isinstance(reader, kinds)]
    if not readers and collator.ulysses * collator.ring * collator.data_ranks > 1:
        raise ConfigError(
            "a dataset that deals its files out to ranks by itself",
            "ranks of one sequence must read the same samples",
            "give a map-style dataset, or a torch IterableDataset",
        )
    for reader in readers:
        reader.num_processes, reader.process_index = collator.data_ranks, collator.data_rank
