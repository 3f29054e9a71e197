"""Opening a dataset and fetching its first sample, at a million and a billion tokens: megasp beside megatron-core.

    python -m benchmarks.open_dataset [--tokens 1000000 1000000000]

Files of documents of 1000 tokens are made on the spot (the .bin is sparse, so a billion tokens take 20 MB of disk).
A call opens the two files anew, makes the training set of one epoch and reads its first sample of 2048 tokens.
megatron-core is measured twice: building its sample index, and with the index that an earlier run left in a cache.
Page caches are warm in all. The time of megasp must not depend on the size.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.contest import Contestant, play, ratio, record, table
from benchmarks.trainers import version
from megasp.data import GPTDataset, IndexedDataset, split_ranges
from megasp.data.indexed_dataset import HEADER, MAGIC

SEQUENCE = 2048
DOCUMENT = 1000
SPLIT = "1,0,0"


def write_corpus(prefix: Path, tokens: int) -> None:
    """`tokens` zeros as uint16, in documents of 1000."""
    documents = tokens // DOCUMENT
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * documents * DOCUMENT)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(np.full(documents, DOCUMENT, "<i4").tobytes())
        file.write((np.arange(documents, dtype="<i8") * 2 * DOCUMENT).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())


def make_megasp(prefix: str) -> Callable[[int], int]:
    """Returns the length of the sample read, as its peer does."""

    def call(index: int) -> int:
        corpus = IndexedDataset(prefix)
        training = split_ranges(SPLIT, len(corpus))[0]
        sample = GPTDataset(corpus, training, SEQUENCE, seed=1234).sample(0)
        return len(sample.tokens(0, SEQUENCE + 1).astype(np.int64)) - 1

    return call


def make_megatron(prefix: str, cache: str, keep: bool) -> Callable[[int], int]:
    """megatron-core's own builder.

    Args:
        cache: directory for its index files.
        keep: whether calls share it: then the first one, in the warm-up, makes the files that the others read.
    """
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        vocab_size = 50000
        eod = 1
        unique_identifiers: ClassVar = {"class": "Tokenizer"}

    def call(index: int) -> int:
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=SEQUENCE,
            blend=([prefix], None),
            split=SPLIT,
            path_to_cache=cache if keep else f"{cache}-{index}",
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        built: Any = BlendedMegatronDatasetBuilder(MegatronDataset, [None, 0, 0], lambda: True, config).build()
        return len(built[0][0]["tokens"])

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10**6, 10**9])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megasp-corpus-") as name:
        contestants = []
        for tokens in args.tokens:
            prefix = Path(name, f"tokens{tokens}")
            write_corpus(prefix, tokens)
            size = f"{tokens:.0e} tokens"
            contestants += [
                Contestant(f"megasp, {size}", make_megasp, (str(prefix),)),
                Contestant(f"megatron-core, {size}", make_megatron, (f"{prefix}", f"{prefix}-built", False)),
                Contestant(f"megatron-core cached, {size}", make_megatron, (f"{prefix}", f"{prefix}-cache", True)),
            ]

        def same(lengths: Any) -> None:
            assert set(lengths.values()) == {SEQUENCE}, lengths

        outcomes = play(contestants, args.rounds, args.warmup, same)
    print("## Opening a dataset and reading its first sample\n")
    print(table(outcomes), "\n")
    ours = outcomes[::3]
    for outcome in ours[1:]:
        print(f"{outcome.contestant.name} / {ours[0].contestant.name}: {ratio(outcome, ours[0]).text()}")
    versions = [f"torch {torch.__version__}", version("megatron-core")]
    print(json.dumps({"benchmark": "open_dataset", "versions": versions, "contestants": record(outcomes)}))


if __name__ == "__main__":
    main()
