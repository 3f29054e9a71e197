"""`megasp data explain`: which documents and tokens the samples of a training step read.

megasp data explain --load ckpt --step 12000                              a step of a run, past or to come
megasp data explain PREFIX --step 3 --seq-length 2048 --global-batch-size 64              by the flags of a run
"""

from dataclasses import dataclass

from megasp import log
from megasp.config.batch_schedule import BatchSchedule
from megasp.config.flags import REQUIRED, flag
from megasp.config.schema import PACKINGS
from megasp.data import phases
from megasp.data.blend import BlendedDataset
from megasp.data.gpt_dataset import GPTDataset
from megasp.data.megatron_order import MegatronBlend, MegatronDataset
from megasp.data.phases import Phase
from megasp.data.tokenizer_options import TokenizerOptions
from megasp.errors import DataError

SUBSETS = ("train", "valid", "test")
PREVIEW = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Options(TokenizerOptions):
    """Explanation of a step's data. Without --load, give the flags of the run."""

    data_path: tuple[str, ...] = flag(
        (), "corpora, as --data-path takes them", name="data_path", metavar="[WEIGHT] PREFIX"
    )
    step: int = flag(REQUIRED, "training step, from 1 as the log counts")
    load: str | None = flag(None, "checkpoint, or directory of them, whose run is meant", metavar="DIR")
    seq_length: int | None = flag(None, "tokens of a sample")
    global_batch_size: int | None = flag(None, "samples of a step")
    seed: int = flag(1234, "seed of the order")
    split: str = flag("969,30,1", "shares of the corpus for training, validation and test")
    document_packing: str = flag("stream", "how documents fill samples", choices=PACKINGS)
    subset: str = flag("train", "part of the split", choices=SUBSETS)


def run(options: Options) -> int:
    """Print one line for each sample of the step, and the text it begins with if a tokenizer is named."""
    if options.step < 1:
        raise DataError(f"--step is {options.step}", "steps count from 1", "use 1 or more")
    phase = _phase(options)
    dataset = phase.dataset(SUBSETS.index(options.subset))
    tokenizer = options.build()
    if options.subset == "train":
        first, stop = phase.first_sample(options.step - 1), phase.first_sample(options.step)
    else:
        first, stop = (step * phase.batch.final for step in (options.step - 1, options.step))
    for line in phases.describe(phase):
        log.info(line)
    log.info(f"step {options.step} reads samples {first} to {stop - 1} of {dataset.name}")
    for k in range(first, stop):
        log.info(describe(dataset, k))
        if tokenizer:
            text = tokenizer.decode(dataset.sample(k).tokens(0, min(PREVIEW, phase.seq_length)))
            log.info(f"    {text!r}")
    return 0


def _phase(options: Options) -> Phase:
    """The phase that the step belongs to."""
    if options.load is None:
        if not options.data_path or options.seq_length is None or options.global_batch_size is None:
            rule = "a PREFIX, --seq-length and --global-batch-size say what a step reads"
            raise DataError("no --load", rule, "give these three, or --load CHECKPOINT")
        batch = BatchSchedule(options.global_batch_size)
        return phases.first_phase(
            options.data_path,
            options.split,
            options.seq_length,
            options.seed,
            batch,
            packing=options.document_packing,
        )
    stored = [phase for phase in phases.read_checkpoint(options.load) if phase.step < options.step]
    if not stored or not stored[-1].parts:
        raise DataError(f"the run of {options.load} trains on synthetic data", "it has no documents", "name another")
    return stored[-1]


def describe(dataset: BlendedDataset | GPTDataset | MegatronDataset | MegatronBlend, k: int) -> str:
    """The dataset, place in its order, token ranges and documents of sample k, without the token after its end (the
    last label)."""
    part, number = dataset.locate(k)
    sample, corpus, ranges = part.sample(number), part.corpus, []
    for start, stop in sample.pieces(0, part.seq_length):
        first, last = corpus.document_at(start), corpus.document_at(stop - 1)
        begin, end = start - corpus.document_range(first)[0], stop - corpus.document_range(last)[0]
        ranges.append(f"tokens {start}-{stop - 1} = document {first} token {begin} to document {last} token {end - 1}")
    if sample.length < part.seq_length:
        ranges.append(f"{part.seq_length - sample.length} of padding")
    return f"sample {k}: {part.name}, {part.place(number)}: " + ", then ".join(ranges)
