"""`megasp train-tokenizer`: a byte-level BPE vocabulary, written as a Hugging Face tokenizer.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megasp import log
from megasp.config.flags import REQUIRED, flag
from megasp.data.atomic_files import AtomicFiles
from megasp.data.text_files import InputOptions, find_files, read_documents, texts_of
from megasp.errors import DataError

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Options(InputOptions):
    """Tokenizer training."""

    vocab_size: int = flag(REQUIRED, "token ids, the 256 bytes and the special tokens among them")
    output: str = flag(REQUIRED, "tokenizer.json to write, or a directory for it", metavar="PATH")
    special_tokens: tuple[str, ...] = flag(
        ("<|endoftext|>",), "tokens outside of the merges; the first ends a document", metavar="TOKEN"
    )
    min_frequency: int = flag(2, "occurrences a pair needs to be merged")
    overwrite: bool = flag(False, "replace an existing file")


def run(options: Options) -> int:
    """Train on all documents of the input."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = BYTES + len(options.special_tokens)
    if options.vocab_size < least:
        rule = f"256 bytes and {len(options.special_tokens)} special tokens come first"
        raise DataError(f"--vocab-size is {options.vocab_size}", rule, f"use {least} or more")
    path = Path(options.output)
    path = path if path.suffix == ".json" else path / "tokenizer.json"
    files = find_files(options.input, options.extensions, options.exclude)
    with AtomicFiles(path, overwrite=options.overwrite) as output:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocab_size,
            min_frequency=options.min_frequency,
            special_tokens=list(options.special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be encoded
            show_progress=False,
        )
        tokenizer.train_from_iterator(_texts(files, options), trainer)
        output.files[0].write(tokenizer.to_str(pretty=True).encode())
    size = tokenizer.get_vocab_size()
    if size < options.vocab_size:
        log.warning(f"the text has no more pairs to merge: {size} tokens instead of {options.vocab_size}")
    log.info(f"wrote {path}: {size} tokens from {len(files)} files")
    log.info(f"next: megasp preprocess --tokenizer-model {path} --append-eod --input ... --output-prefix ...")
    return 0


def _texts(files: list[Path], options: Options) -> Iterator[str]:
    """All text of the input, with progress."""
    bad = 0
    with log.progress(None, "reading", sum(file.stat().st_size for file in files), "B") as bar:
        for document in read_documents(files):
            try:
                yield from texts_of(document, options.json_keys)
            except DataError as error:
                if not options.skip_bad_lines:
                    raise DataError(f"{document.place}: {error.got}", error.rule, error.fix) from None
                bad += 1
            bar.update(len(document.raw))
    if bad:
        log.warning(f"left out {bad} documents that are not valid text or JSON")
