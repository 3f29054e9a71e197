"""The .bin/.idx format, with megatron-core's own reader and writer as the oracle."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megasp.data import GPTDataset, IndexedDataset, IndexedDatasetBuilder, best_dtype, indexed_dataset
from megasp.data.indexed_dataset import DTYPES, HEADER, MAGIC
from megasp.errors import DataError

GOLDEN = [[1, 2, 3, 4, 0], [6, 7, 0], [9, 10, 11, 12, 13, 14, 0], [0], [17, 18, 19, 0]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for tokens in documents:
            builder.add_document(tokens)
    return prefix


def random_documents(rng: np.random.Generator, high: int) -> list[tuple[np.ndarray, list[int]]]:
    """(tokens, lengths of sequences) of each document; empty documents and empty sequences among them."""
    documents = []
    for _ in range(rng.integers(0, 8)):
        lengths = rng.integers(0, 6, rng.integers(0, 4)).tolist()
        documents.append((rng.integers(0, high, sum(lengths)), lengths))
    return documents


def test_golden_bytes(tmp_path):
    prefix = write(tmp_path / "golden", GOLDEN)
    index = (tmp_path / "golden.idx").read_bytes()
    assert len(index) == 142
    assert hashlib.md5(index).hexdigest() == "1775763dc7135385e4770d8ae47b796d"
    assert [sequence.tolist() for sequence in IndexedDataset(prefix)] == GOLDEN


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_megatron_core_both_ways(tmp_path, seed):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rng = np.random.default_rng(seed)
    dtype = rng.choice(list(DTYPES.values()))
    documents = random_documents(rng, 100)
    if not sum(len(tokens) for tokens, _ in documents):
        documents.append((np.array([1]), [1]))  # the oracle cannot map an empty file
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    with IndexedDatasetBuilder(tmp_path / "ours", dtype) as ours:
        for tokens, lengths in documents:
            ours.add_document(tokens, lengths)
            theirs.add_document(tokens, lengths)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    read, expected = IndexedDataset(tmp_path / "theirs"), megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(expected) and read.num_documents == len(documents)
    for i in range(len(read)):
        np.testing.assert_array_equal(read[i], expected[i])
    np.testing.assert_array_equal(read.document_indices, expected.document_indices)


def test_merge_agrees_with_megatron_core(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    parts = [write(tmp_path / "a", GOLDEN), write(tmp_path / "b", [[], [5, 6], [7]])]
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedDatasetBuilder(tmp_path / "ours", np.uint16) as ours:
        for part in parts:
            ours.add_index(part)
            theirs.add_index(str(part))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_stream_and_documents(tmp_path, seed):
    documents = [*random_documents(np.random.default_rng(seed), 100), (np.array([1, 2]), [2])]
    with IndexedDatasetBuilder(tmp_path / "corpus", np.int32) as builder:
        for tokens, lengths in documents:
            builder.add_document(tokens, lengths)
    corpus = IndexedDataset(tmp_path / "corpus")
    stream = np.concatenate([tokens for tokens, _ in documents])
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), stream)
    owner = np.repeat(np.arange(len(documents)), [len(tokens) for tokens, _ in documents])
    assert [corpus.document_at(token) for token in range(len(stream))] == owner.tolist()
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            expected = starts[(starts >= start) & (starts < stop)]
            np.testing.assert_array_equal(corpus.document_starts(start, stop), expected)
    for document, (tokens, _) in enumerate(documents):
        np.testing.assert_array_equal(corpus.tokens(*corpus.document_range(document)), tokens)


def test_empty_dataset_opens(tmp_path):
    corpus = IndexedDataset(write(tmp_path / "empty", []))
    assert (len(corpus), corpus.num_documents, corpus.num_tokens) == (0, 0, 0)


def test_a_sparse_corpus_of_a_billion_tokens_opens_and_is_sampled_without_reading_it(tmp_path):
    length, sequences = 1000, 10**6
    with open(tmp_path / "big.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, sequences, 2))
        # only the last entry of each array is written; whoever scans the zeros before them fails
        file.seek(HEADER.size + 4 * (sequences - 1))
        file.write(struct.pack("<i", length))
        file.seek(HEADER.size + 12 * sequences - 8)
        file.write(struct.pack("<qqq", length * (sequences - 1) * 2, 0, sequences))
    (tmp_path / "big.bin").touch()
    os.truncate(tmp_path / "big.bin", 2 * length * sequences)
    corpus = IndexedDataset(tmp_path / "big")
    assert corpus.num_tokens == 10**9
    dataset = GPTDataset(corpus, (0, sequences), seq_length=4096, seed=1)
    assert dataset.sample(10**12).tokens(0, 4097).sum() == 0
    assert corpus.fingerprint()


def test_fingerprint_notices_appending_and_rebuilding(tmp_path):
    prints = {IndexedDataset(write(tmp_path / "a", GOLDEN)).fingerprint()}
    assert IndexedDataset(write(tmp_path / "same", GOLDEN)).fingerprint() in prints
    for name, documents in {
        "more": [*GOLDEN, [1]],
        "shuffled": GOLDEN[::-1],
        "joined": [np.concatenate(GOLDEN)],
    }.items():
        prints.add(IndexedDataset(write(tmp_path / name, documents)).fingerprint())
    prints.add(IndexedDataset(write(tmp_path / "wide", GOLDEN, "int32")).fingerprint())
    assert len(prints) == 5


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def resize(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


BAD_FILES = {
    "no idx": (lambda bin, idx: idx.unlink(), "corpus.idx does not exist"),
    "no bin": (lambda bin, idx: bin.unlink(), "corpus.bin does not exist"),
    "empty idx": (lambda bin, idx: idx.write_bytes(b""), "starts with b''"),
    "other magic": (lambda bin, idx: patch(idx, 0, b"PK"), "starts with b'PKI"),
    "legacy": (lambda bin, idx: patch(idx, 0, b"TNTIDX\x00\x00"), "legacy format (TNTIDX)"),
    "version": (lambda bin, idx: patch(idx, 9, b"\x02"), "version 2"),
    "dtype": (lambda bin, idx: patch(idx, 17, b"\x09"), "dtype code 9"),
    "short header": (lambda bin, idx: os.truncate(idx, 20), "truncated at 20 bytes"),
    "short idx": (lambda bin, idx: resize(idx, -1), "truncated: 141 bytes"),
    "long idx": (lambda bin, idx: resize(idx, 1), "longer than its header says: 143 bytes"),
    "multimodal": (lambda bin, idx: resize(idx, 5), "a mode per sequence"),
    "document ends": (lambda bin, idx: patch(idx, 134, b"\x04"), "document ends (0, 4)"),
    "short bin": (lambda bin, idx: resize(bin, -2), "shorter than its index says: 38 bytes"),
    "long bin": (lambda bin, idx: resize(bin, 2), "longer than its index says: 42 bytes"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_a_sentence(tmp_path, case):
    write(tmp_path / "corpus", GOLDEN)
    spoil, message = BAD_FILES[case]
    spoil(tmp_path / "corpus.bin", tmp_path / "corpus.idx")
    with pytest.raises(DataError) as error:
        IndexedDataset(tmp_path / "corpus")
    assert message in error.value.got and error.value.rule and error.value.fix


def test_a_prefix_with_an_ending_is_explained(tmp_path):
    write(tmp_path / "corpus", GOLDEN)
    with pytest.raises(DataError, match=r"give the prefix, .*/corpus\."):
        IndexedDataset(tmp_path / "corpus.bin")


def test_builder_leaves_nothing_behind_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_document([1, 2])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_builder_refuses_what_it_cannot_write(tmp_path):
    write(tmp_path / "corpus", GOLDEN)
    write(tmp_path / "wide", GOLDEN, "int32")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="exists"):
        IndexedDatasetBuilder(tmp_path / "corpus", np.uint16)
    with pytest.raises(DataError, match="cannot write"):
        IndexedDatasetBuilder(tmp_path / "file" / "corpus", np.uint16)
    with pytest.raises(DataError, match="dtype uint64"):
        IndexedDatasetBuilder(tmp_path / "new", np.uint64)
    for token in (70000, -1):
        with (
            pytest.raises(DataError, match=f"token id {token}: a uint16 dataset holds 0 to 65535"),
            IndexedDatasetBuilder(tmp_path / "new", np.uint16) as builder,
        ):
            builder.add_document([1, token])
    with (
        pytest.raises(DataError, match=r"holds int32: all parts of .* must be uint16"),
        IndexedDatasetBuilder(tmp_path / "new", np.uint16) as builder,
    ):
        builder.add_index(tmp_path / "wide")
    assert sorted(tmp_path.iterdir()) == before


def test_dtype_follows_the_vocabulary():
    assert best_dtype(65499) == np.uint16 and best_dtype(65500) == np.int32


def rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))  # clocks of file systems tick slowly


CHANGES = {
    "bin truncated": (lambda bin, idx: resize(bin, -2), "was written to or replaced"),
    "idx truncated": (lambda bin, idx: resize(idx, -8), "was written to or replaced"),
    "bin overwritten": (lambda bin, idx: rewrite(bin, bin.read_bytes()[::-1]), "was written to or replaced"),
    "idx overwritten": (lambda bin, idx: rewrite(idx, idx.read_bytes()), "was written to or replaced"),
    "appended to": (lambda bin, idx: resize(bin, 2), "was written to or replaced"),
    "bin gone": (lambda bin, idx: bin.unlink(), r"is gone \(No such file or directory\)"),
    "idx gone": (lambda bin, idx: idx.unlink(), r"is gone \(No such file or directory\)"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_corpus_that_changes_under_a_running_job_is_told(tmp_path, monkeypatch, case):
    monkeypatch.setattr(indexed_dataset, "CHECK_SECONDS", 0.0)
    dataset = GPTDataset(IndexedDataset(write(tmp_path / "corpus", GOLDEN)), (0, 5), 4, seed=0)
    dataset.sample(0)
    change, message = CHANGES[case]
    change(tmp_path / "corpus.bin", tmp_path / "corpus.idx")
    with pytest.raises(DataError, match=f"corpus {message} while it was in use: .*; restore it"):
        dataset.sample(1)


def test_a_file_that_became_shorter_since_the_last_look_is_told_too(tmp_path):
    """Mapped into memory it would end the process by SIGBUS."""
    dataset = GPTDataset(IndexedDataset(write(tmp_path / "corpus", GOLDEN)), (0, 5), 20, seed=0)
    sample = dataset.sample(0)
    os.truncate(tmp_path / "corpus.bin", 10)
    with pytest.raises(DataError, match="ends before the tokens that its index names while it was in use"):
        sample.tokens(0, 21)


def test_a_dataset_that_holds_no_ids_is_refused(tmp_path):
    corpus = IndexedDataset(write(tmp_path / "corpus", GOLDEN, "float32"))
    with pytest.raises(DataError, match="holds float32: token ids are integers"):
        GPTDataset(corpus, (0, 5), 4, seed=0)
