"""The tokenizer and the datasets that a configuration names."""

import dataclasses
from dataclasses import dataclass
from functools import partial

from megasp.config.schema import Config
from megasp.data import (
    Dataset,
    GPTDataset,
    IndexedDataset,
    Loader,
    MockDataset,
    Tokenizer,
    build_tokenizer,
    split_ranges,
)
from megasp.errors import ConfigError
from megasp.parallel_state import ParallelState
from megasp.shard_map import ShardMap


@dataclass(frozen=True)
class Datasets:
    """What a run reads; `valid` is None where there is no evaluation."""

    train: Dataset
    valid: Dataset | None


def tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer that the configuration names, if it names one."""
    if config.data.tokenizer_type is None:
        return None
    return build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model, config.model.vocab_size)


def resolve(config: Config) -> Config:
    """The configuration with what only the files know: the tokenizer's vocabulary size, and positions to cover."""
    model = config.model
    if model.vocab_size is None:
        tokenizer = tokenizer_of(config)
        if tokenizer is None:
            raise ConfigError(
                "no vocabulary",
                "the model needs its size",
                "give --tokenizer-type and --tokenizer-model, or --vocab-size",
            )
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.max_position_embeddings is None:
        model = dataclasses.replace(model, max_position_embeddings=config.training.seq_length)
    return dataclasses.replace(config, model=model)


def build_datasets(config: Config) -> Datasets:
    """Open the corpus (nothing is built) or make synthetic data.

    Raises:
        DataError: files that cannot be read, or a split that holds no sample.
    """
    training, data = config.training, config.data
    if data.mock_data:
        assert config.model.vocab_size is not None
        vocab, length = config.model.vocab_size, training.seq_length
        # Another seed gives other samples for validation.
        held_out = MockDataset(vocab, length, training.seed + 1) if training.eval_iters else None
        return Datasets(MockDataset(vocab, length, training.seed), held_out)
    corpus = IndexedDataset(data.data_path[0])
    train, valid, _ = split_ranges(data.split, len(corpus))
    dataset = partial(GPTDataset, corpus, seq_length=training.seq_length, seed=training.seed)
    return Datasets(dataset(train), dataset(valid) if training.eval_iters else None)


def build_loader(
    config: Config, state: ParallelState, shard_map: ShardMap, dataset: Dataset, first_sample: int = 0
) -> Loader:
    """Batches of this rank: its samples of each step, its positions of each sample."""
    eod = None
    if config.data.eod_mask_loss:
        tokenizer = tokenizer_of(config)
        if tokenizer is None:
            raise ConfigError(
                "--eod-mask-loss", "the end-of-document token is the tokenizer's", "give --tokenizer-type"
            )
        eod = tokenizer.eod
    return Loader(
        dataset,
        shard_map.ranges[state.cp.rank],
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.global_batch_size(state.layout),
        dp_rank=state.dp.rank,
        dp_size=state.dp.size,
        vocab_size=config.model.padded_vocab_size,
        reset_attention_mask=config.data.reset_attention_mask,
        eod=eod,
        first_sample=first_sample,
        prefetch=config.data.num_workers,
    )
