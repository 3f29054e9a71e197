"""Reading samples: megasp beside megatron-core's GPTDataset, in one run, on one corpus.

    python benchmarks/data.py [--docs 200000] [--mean 500] [--seqs 2048 131072] [--big]

Prints a JSON line for each measurement; `ratio` is megasp's rate over the peer's. Both read the same `.bin/.idx` from
the page cache, one thread, medians of --rounds that alternate. --big adds the first sample of a corpus of 10^9 tokens
in 10^7 documents (a sparse file: 2 GB of holes, 200 MB of index), beside the peer's index build.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from megasp.data import GPTDataset, IndexedDataset, IndexedDatasetBuilder
from megasp.data.indexed_dataset import HEADER, MAGIC
from megasp.data.packing import forget_packings

VOCAB = 32000


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, unique_identifiers = VOCAB, 0, {"class": "Tokenizer"}


def write_corpus(prefix: str, docs: int, mean: int) -> None:
    """Lognormal document lengths, random tokens, each document ending in 0."""
    random = np.random.RandomState(0)
    lengths = np.maximum(1, random.lognormal(np.log(mean) - 0.5, 1.0, docs)).astype(np.int64)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for length in lengths.tolist():
            tokens = random.randint(1, VOCAB, length).astype(np.uint16)
            tokens[-1] = 0
            builder.add_document(tokens)


def write_sparse(prefix: str, tokens: int, docs: int) -> None:
    """A corpus of equal documents whose tokens are a hole in the file."""
    length = tokens // docs
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, docs, docs + 1))
        file.write(np.full(docs, length, "<i4").tobytes())
        file.write((np.arange(docs, dtype="<i8") * 2 * length).tobytes())
        file.write(np.arange(docs + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)


def megatron(prefix: str, seq_length: int):
    """megatron-core's training dataset, one epoch, its index built in memory."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset as Peer
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=1234, sequence_length=seq_length, blend=([prefix], None), split="1,0,0", path_to_cache=cache,
            tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
            create_attention_mask=False,
        )  # fmt: skip
        return BlendedMegatronDatasetBuilder(Peer, [None, 0, 0], lambda: True, config).build()[0]


def ours(prefix: str, seq_length: int, packing: str = "stream") -> GPTDataset:
    corpus = IndexedDataset(prefix)
    return GPTDataset(corpus, (0, len(corpus)), seq_length, seed=1234, packing=packing)


def read_ours(dataset: GPTDataset, k: int):
    """Tokens and labels of a sample, int64, as a batch takes them."""
    ids = dataset.sample(k).tokens(0, dataset.seq_length + 1).astype(np.int64)
    return ids[:-1], ids[1:]


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def emit(**values) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def rates(prefix: str, seq_length: int, reads: int, rounds: int) -> None:
    """Samples per second of both; rounds alternate, so that a busy machine is busy for both."""
    theirs = megatron(prefix, seq_length)
    mine, packed = ours(prefix, seq_length), ours(prefix, seq_length, "best-fit")
    count = min(len(theirs), reads)
    readers = {
        "megasp": partial(read_ours, mine),
        "megatron-core": lambda k: theirs[k % len(theirs)],
        "megasp best-fit": partial(read_ours, packed),
    }
    emit(bench="best_fit", seq_length=seq_length, padding=packed.stream.padding)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        numbers = range(number * count, (number + 1) * count)
        for name, read in readers.items():
            start = time.perf_counter()
            for k in numbers:
                read(k)
            times[name].append(time.perf_counter() - start)
    rate = {name: count / statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    ratio = rate["megasp"] / rate["megatron-core"]
    emit(bench="samples_per_s", seq_length=seq_length, reads=count, **rate, ratio=ratio)


def first_sample(prefix: str, seq_length: int, rounds: int) -> None:
    """From opening the files to the first sample in memory; best-fit packs all documents before it, once a process."""
    mine = statistics.median(milliseconds(lambda: read_ours(ours(prefix, seq_length), 0)) for _ in range(rounds))
    theirs = milliseconds(lambda: megatron(prefix, seq_length)[0])
    forget_packings()
    packed = milliseconds(lambda: read_ours(ours(prefix, seq_length, "best-fit"), 0))
    times = {"megasp": mine, "megatron_core": theirs, "megasp_best_fit": packed}
    emit(bench="first_sample_ms", seq_length=seq_length, **times, ratio=theirs / mine)


MEMORY = """
import resource, sys
from benchmarks.data import ours, read_ours
def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
before = private()
dataset = ours(sys.argv[1], int(sys.argv[2]))
for k in range(2000 * 2048 // int(sys.argv[2])):
    read_ours(dataset, k)
print(private() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"docs": 200_000, "mean": 500, "samples": 4000, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seqs", type=int, nargs="+", default=[2048, 131072])
    parser.add_argument("--big", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import megatron.core
    import torch

    torch.set_num_threads(1)
    emit(bench="setting", docs=options.docs, mean=options.mean, megatron_core=megatron.core.__version__)
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder, "corpus"))
        write_corpus(prefix, options.docs, options.mean)
        for seq_length in options.seqs:
            rates(prefix, seq_length, options.samples * 2048 // seq_length, options.rounds)
            first_sample(prefix, seq_length, options.rounds)
        program = [sys.executable, "-c", MEMORY, prefix, "2048"]
        grown = subprocess.run(program, check=True, capture_output=True, text=True)
        emit(bench="private_memory_mb_over_the_mapped_file", megasp=float(grown.stdout))
        if options.big:
            big = str(Path(folder, "big"))
            write_sparse(big, 10**9, 10**7)
            first_sample(big, 2048, options.rounds)
    emit(bench="peak_rss_mb", all=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
