"""`megasp data explain`: which documents and tokens the samples of a training step read."""

from dataclasses import dataclass

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.gpt_dataset import GPTDataset, split_ranges
from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.tokenizer import TokenizerOptions
from megasp.errors import DataError

SUBSETS = ("train", "valid", "test")
PREVIEW = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Options(TokenizerOptions):
    """Explanation of a step's data. Give --seq-length, --global-batch-size, --seed and --split as to training."""

    prefix: str = flag(
        REQUIRED, "path of the .bin and .idx files without these endings", name="prefix", metavar="PREFIX"
    )
    step: int = flag(REQUIRED, "training step, from 1 as the log counts")
    seq_length: int = flag(REQUIRED, "tokens of a sample")
    global_batch_size: int = flag(REQUIRED, "samples of a step")
    seed: int = flag(1234, "seed of the order")
    split: str = flag("969,30,1", "shares of the corpus for training, validation and test")
    subset: str = flag("train", "part of the split", choices=SUBSETS)


def run(options: Options) -> int:
    """Print one line for each sample of the step, and the text it begins with if a tokenizer is named."""
    if options.step < 1:
        raise DataError(f"--step is {options.step}", "steps count from 1", "use 1 or more")
    corpus = IndexedDataset(options.prefix)
    sequences = split_ranges(options.split, len(corpus))[SUBSETS.index(options.subset)]
    dataset = GPTDataset(corpus, sequences, options.seq_length, options.seed)
    tokenizer = options.build()
    first = (options.step - 1) * options.global_batch_size
    log.info(
        f"step {options.step} reads samples {first} to {first + options.global_batch_size - 1} of {options.prefix}"
    )
    for k in range(first, first + options.global_batch_size):
        log.info(describe(dataset, k))
        if tokenizer:
            text = tokenizer.decode(dataset.sample(k).tokens(0, min(PREVIEW, options.seq_length)))
            log.info(f"    {text!r}")
    return 0


def describe(dataset: GPTDataset, k: int) -> str:
    """The epoch, the token ranges and the documents of sample k, the token after its end (the last label) left out."""
    corpus, parts = dataset.corpus, []
    for start, stop in dataset.sample(k).pieces(0, dataset.seq_length):
        first, last = corpus.document_at(start), corpus.document_at(stop - 1)
        begin, end = start - corpus.document_range(first)[0], stop - corpus.document_range(last)[0]
        parts.append(f"tokens {start}-{stop - 1} = document {first} token {begin} to document {last} token {end - 1}")
    return f"sample {k}, epoch {k // dataset.samples_per_epoch}: " + ", then ".join(parts)
