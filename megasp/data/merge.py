"""`megasp data merge A B ... --output-prefix AB`: several corpora as one, documents in the order given."""

from dataclasses import dataclass

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.indexed_dataset_builder import IndexedDatasetBuilder
from megasp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Merging."""

    prefixes: tuple[str, ...] = flag(REQUIRED, "corpora to put one after the other", name="prefixes", metavar="PREFIX")
    output_prefix: str = flag(REQUIRED, "output goes to PREFIX.bin and .idx", metavar="PREFIX")


def run(options: Options) -> int:
    """Merge; both files appear whole or not at all."""
    if len(options.prefixes) < 2:
        raise DataError(f"one corpus, {options.prefixes[0]}", "two or more make a merged one", "name another")
    first = IndexedDataset(options.prefixes[0])
    with IndexedDatasetBuilder(options.output_prefix, first.dtype) as builder:
        for prefix in log.progress(options.prefixes, "merging", unit="corpora"):
            builder.add_index(prefix)
    merged = IndexedDataset(options.output_prefix)
    log.info(f"wrote {options.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    log.info("it holds one source after the other: to mix them, give them to training as a weighted --data-path")
    return 0
