"""The tokenizer and the datasets that a configuration names."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megasp import log
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.data import Dataset, DocumentRules, IndexedDataset, Loader, MockDataset, Tokenizer, TokenizerOptions
from megasp.data.document_lengths import SORTED, looks_sorted, some_lengths
from megasp.data.phases import Phase, first_phase
from megasp.errors import ConfigError, DataError
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel.shards import Shards

VALIDATION = "validation"
"""Name of the validation set where there is one."""


@dataclass(frozen=True)
class Datasets:
    """What a run reads: validation sets by name, none without evaluation; `test` is None where it is empty."""

    train: Dataset
    valid: Mapping[str, Dataset]
    test: Dataset | None


def tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer that the configuration names, if it names one."""
    if config.data.tokenizer_type is None:
        return None
    data, vocab_size = config.data, config.model.vocab_size
    if data.tokenizer_type == "NullTokenizer" and data.tokenizer_model is not None:
        vocab_size = int(data.tokenizer_model)  # `resolve` left the number of ids there
    return TokenizerOptions(
        tokenizer_type=data.tokenizer_type,
        tokenizer_model=data.tokenizer_model,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        tiktoken_pattern=data.tiktoken_pattern,
        vocab_size=vocab_size,
    ).build()


def resolve(config: Config) -> Config:
    """The configuration with what only the files know: the tokenizer's vocabulary size, and positions to cover."""
    model, data, tokenizer = config.model, config.data, tokenizer_of(config)
    if tokenizer is None and model.vocab_size is None:
        raise ConfigError(
            "no vocabulary",
            "the model needs its size",
            "give --tokenizer-type and --tokenizer-model, or --vocab-size",
        )
    if tokenizer is not None and data.tokenizer_type == "NullTokenizer" and data.tokenizer_model is None:
        # Its --vocab-size counts the ids, and the end-of-document token comes on top of them, as in Megatron-LM.
        data = dataclasses.replace(data, tokenizer_model=str(model.vocab_size))
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if tokenizer is not None and model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if tokenizer is not None and (model.vocab_size or 0) < tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size is {model.vocab_size}",
            f"{data.tokenizer_type} has ids up to {tokenizer.vocab_size - 1}",
            f"leave it out, or give {tokenizer.vocab_size} or more",
        )
    if model.max_position_embeddings is None:
        model = dataclasses.replace(model, max_position_embeddings=config.training.seq_length)
    return dataclasses.replace(config, model=model, data=data)


def phase_of(config: Config, layout: Layout) -> Phase:
    """What the training samples of this configuration are made of, from the beginning of the corpora."""
    data, training = config.data, config.training
    path, split = (data.train_data_path, "1") if data.train_data_path else (data.data_path, data.split)
    batch = config.batch_schedule(layout)
    samples = training.train_samples or batch.advance(0, training.train_iters or 0)
    megatron = samples if data.data_order == "megatron" else 0
    return first_phase(path, split, training.seq_length, training.seed, batch, megatron, data.document_packing)


def build_datasets(config: Config, phase: Phase | None = None) -> Datasets:
    """Open the corpora (nothing is built) or make synthetic data.

    Args:
        phase: what training reads; without it, as at the beginning of a run.

    Raises:
        DataError: files that cannot be read, or a split that holds no sample.
    """
    training, data = config.training, config.data
    if data.mock_data:
        assert config.model.vocab_size is not None
        vocab, length = config.model.vocab_size, training.seq_length
        # Another seed gives other samples for validation.
        held_out = {VALIDATION: MockDataset(vocab, length, training.seed + 1)} if training.eval_iters else {}
        return Datasets(MockDataset(vocab, length, training.seed), held_out, None)
    phase = phase or phase_of(config, Layout())
    train = phase.dataset()
    if not training.eval_iters:
        return Datasets(train, {}, None)
    if data.train_data_path:
        paths = {VALIDATION: data.valid_data_path}
        if data.multiple_validation_sets:
            paths = {Path(prefix).name: (prefix,) for prefix in data.valid_data_path}
        valid = {name: _whole(config, phase, prefixes) for name, prefixes in paths.items()}
        return Datasets(train, valid, _whole(config, phase, data.test_data_path) if data.test_data_path else None)
    try:
        test = phase.dataset(2)
    except DataError as error:
        test = None
        log.info(f"no test set: {error.got}")
    return Datasets(train, {VALIDATION: phase.dataset(1)}, test)


def _whole(config: Config, phase: Phase, data_path: Sequence[str]) -> Dataset:
    """All of some corpora, blended."""
    length, seed, packing = config.training.seq_length, config.training.seed, config.data.document_packing
    return first_phase(data_path, "1", length, seed, phase.batch, packing=packing).dataset()


def warn_of_sorted_corpora(phase: Phase) -> None:
    """Warn of each corpus whose documents look sorted, by a thousand of them."""
    for part in phase.parts:
        if looks_sorted(some_lengths(IndexedDataset(part.prefix))):
            log.warning(f"{part.prefix} {SORTED}")


def constant_batch(config: Config) -> Config:
    """The configuration without a ramp-up: evaluation takes the full batch from the first step on."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, rampup_batch_size=()))


def build_loader(
    config: Config, state: ParallelState, shards: Shards, dataset: Dataset, first_sample: int = 0
) -> Loader:
    """Batches of this rank: its samples of each step, its positions of each sample."""
    data = config.data
    documents = DocumentRules(
        eod=_eod(config),
        mask_loss=data.eod_mask_loss,
        reset_positions=data.reset_position_ids,
        reset_attention=data.reset_attention_mask,
        split_at_eod=data.eod_starts_document,
    )
    return Loader(
        dataset,
        lambda starts: shards.of(starts).ranges[state.cp.rank],
        micro_batch_size=config.training.micro_batch_size,
        batch=config.batch_schedule(state.layout),
        dp_rank=state.dp.rank,
        dp_size=state.dp.size,
        vocab_size=config.model.padded_vocab_size,
        documents=documents,
        first_sample=first_sample,
        prefetch=data.num_workers,
    )


def _eod(config: Config) -> int | None:
    """The end-of-document id, where a flag needs it."""
    flags = {"--eod-mask-loss": config.data.eod_mask_loss, "--eod-starts-document": config.data.eod_starts_document}
    asked = [flag for flag, given in flags.items() if given]
    if not asked:
        return None
    tokenizer = tokenizer_of(config)
    if tokenizer is None:
        raise ConfigError(asked[0], "the end-of-document token is the tokenizer's", "give --tokenizer-type")
    return tokenizer.eod
