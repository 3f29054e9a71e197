"""What a configuration reads: the vocabulary that the tokenizer knows, splits, synthetic data, this rank's batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasp.config.load import from_values
from megasp.data import IndexedDatasetBuilder, NullTokenizer
from megasp.errors import ConfigError, DataError
from megasp.parallel_state import Axis, Layout, ParallelState
from megasp.shard_map import ShardMap
from megasp.training.datasets import build_datasets, build_loader, resolve, tokenizer_of

VALUES: dict[str, Any] = {"seq_length": 8, "vocab_size": 300, "mock_data": True, "num_workers": 0}


def config(**values: Any) -> Any:
    return from_values(VALUES | values)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        for document in range(40):
            builder.add_document(np.full(17, document, np.uint16))
    return str(tmp_path / "corpus")


def test_resolve_asks_the_tokenizer() -> None:
    found = resolve(config(vocab_size=None, tokenizer_type="ByteTokenizer"))
    assert found.model.vocab_size == 257 and found.model.padded_vocab_size == 384
    assert found.model.max_position_embeddings == 8, "as many positions as the sequence has"


def test_resolve_keeps_what_is_given() -> None:
    given = config(max_position_embeddings=64)
    assert resolve(given) == given and resolve(resolve(config())) == resolve(config())


def test_resolve_without_any_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"no vocabulary: .* --tokenizer-type and --tokenizer-model, or --vocab-size"):
        resolve(config(vocab_size=None))


def test_null_tokenizers_end_of_document_is_in_the_vocabulary() -> None:
    """Its ids are 0 .. vocab-size - 1, and vocab-size ends a document: the embedding needs a row for it."""
    given = config(vocab_size=256, make_vocab_size_divisible_by=128, tokenizer_type="NullTokenizer")
    found = resolve(given)
    eod = NullTokenizer(256).eod
    assert found.model.padded_vocab_size > eod, f"id {eod} has no row among {found.model.padded_vocab_size}"
    tokenizer = tokenizer_of(found)
    assert tokenizer is not None and tokenizer.eod == eod, "the same flags name the same token before and after"


def test_vocabulary_smaller_than_the_tokenizers() -> None:
    with pytest.raises(DataError, match=r"--vocab-size is 100: ByteTokenizer has ids up to 256; .* 257 or more"):
        resolve(config(vocab_size=100, tokenizer_type="ByteTokenizer"))


def test_mock_data_is_held_out_by_another_seed() -> None:
    found = build_datasets(config())
    assert not np.array_equal(found.train.sample(0).tokens(0, 9), found.valid["validation"].sample(0).tokens(0, 9))
    assert build_datasets(config(eval_iters=0)).valid == {}


def test_splits_share_no_document(corpus: str) -> None:
    found = build_datasets(config(mock_data=False, data_path=(corpus,), split="50,50,0"))
    both = (found.train, found.valid["validation"])
    seen = [{int(t) for k in range(40) for t in d.sample(k).tokens(0, 9)} for d in both]
    assert seen[0].isdisjoint(seen[1]) and min(map(len, seen)) >= 19


def test_seed_orders_the_samples(corpus: str) -> None:
    def first(seed: int) -> list[int]:
        found = build_datasets(config(mock_data=False, data_path=(corpus,), seed=seed))
        return [int(found.train.sample(k).tokens(0, 1)[0]) for k in range(20)]

    assert first(1) == first(1) and first(1) != first(2)


def test_corpus_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        build_datasets(config(mock_data=False, data_path=(str(tmp_path / "absent"),)))


def test_loader_reads_this_ranks_share() -> None:
    """dp rank 1 of 2 and cp rank 1 of 2: its samples of the batch, its half of each."""
    given = config(micro_batch_size=2, global_batch_size=8)
    axes = ParallelState.single().axes | {"dp": Axis("dp", 2, 1), "cp": Axis("cp", 2, 1)}
    state = ParallelState(Layout(dp_inner=2, ulysses=2), 3, ParallelState.single().device, axes)
    dataset = build_datasets(given).train
    with build_loader(given, state, ShardMap.contiguous(8, 2), dataset, first_sample=16) as loader:
        step = loader.step()
    assert [b.samples.tolist() for b in step] == [[18, 19], [22, 23]]
    assert all(b.positions.tolist() == [4, 5, 6, 7] for b in step)
    assert step[1].tokens[0].tolist() == dataset.sample(22).tokens(4, 8).tolist()
    assert step[1].labels[0].tolist() == dataset.sample(22).tokens(5, 9).tolist()


def test_end_of_document_leaves_the_loss(corpus: str) -> None:
    values = {"mock_data": False, "data_path": (corpus,), "vocab_size": 21, "tokenizer_type": "NullTokenizer"}
    given = config(**values, eod_mask_loss=True)
    tokenizer = tokenizer_of(given)
    assert tokenizer is not None and tokenizer.eod == 21
    with build_loader(given, ParallelState.single(), ShardMap.contiguous(8, 1), build_datasets(given).train) as loader:
        batches = [loader.step()[0] for _ in range(60)]
    masked = np.concatenate([b.tokens[b.loss_mask == 0] for b in batches])
    assert len(masked) and set(masked.tolist()) == {21}
    assert not any((b.tokens[b.loss_mask == 1] == 21).any() for b in batches)


def test_end_of_document_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="--eod-mask-loss: the end-of-document token is the tokenizer's"):
        build_loader(
            config(eod_mask_loss=True),
            ParallelState.single(),
            ShardMap.contiguous(8, 1),
            build_datasets(config()).train,
        )
