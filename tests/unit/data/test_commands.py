"""`megasp data inspect | verify | explain`."""

import re
from pathlib import Path

import numpy as np
import pytest

from megasp.config import flags
from megasp.data import GPTDataset, IndexedDataset, document_lengths, explain, inspect, merge, verify
from megasp.data.indexed_dataset import HEADER
from megasp.errors import DataError


def call(command, *arguments: str) -> int:
    """Run a command as `megasp data COMMAND ARGUMENTS`."""
    return command.run(flags.parse(command.Options, flags.Parser(prog="megasp data"), arguments))


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "megasp")
    return caplog


def patch(path: str, offset: int, value: np.generic) -> None:
    content = bytearray(Path(path).read_bytes())
    content[offset : offset + value.nbytes] = value.tobytes()
    Path(path).write_bytes(content)


def test_inspect_shows_counts_and_text(corpus, said):
    data = corpus([97, 10, 100])
    assert call(inspect, data.prefix, "--tokenizer-type", "ByteTokenizer", "--documents", "1") == 0
    assert "3 documents, 3 sequences, 207 tokens of uint16" in said.text
    assert "shortest 10" in said.text and "median 97" in said.text and "longest 100" in said.text
    assert "document 0: " in said.text and "01234" in said.text and "document 1" not in said.text
    assert call(inspect, corpus([], "empty").prefix) == 0


def test_histogram_counts_documents_and_shares_of_tokens(corpus):
    rows = document_lengths.histogram(np.array([0, 1, 2, 3, 4, 7, 16, 31]))
    found = [(row.span, row.documents, f"{row.share:.1%}") for row in rows]
    assert found[:3] == [("1-1", 1, "1.6%"), ("2-3", 2, "7.8%"), ("4-7", 2, "17.2%")]
    assert found[3:] == [("8-15", 0, "0.0%"), ("16-31", 2, "73.4%")]
    lines = document_lengths.text(rows, width=47)
    assert len(lines) == 6 and lines[-1].endswith("% " + 47 * "#") and lines[-2].endswith("0.0%")
    assert document_lengths.histogram(np.zeros(3, int)) == []
    assert document_lengths.histogram(np.array([2**40 - 1, 2**40]))[0].span == f"{2**39:,}-{2**40 - 1:,}"
    data = corpus([5, 0, 7, 1])
    for lengths in (document_lengths.document_lengths, document_lengths.some_lengths):
        assert lengths(data).tolist() == [5, 0, 7, 1]


def test_inspect_says_what_packing_cuts_and_pads(corpus, said):
    assert call(inspect, corpus([10] * 30).prefix, "--seq-length", "25") == 0
    assert "stream cuts about 36.0% of the documents" in said.text
    assert "best-fit cuts 0.0%, those that are longer, and 20.00% of its tokens are padding" in said.text
    with pytest.raises(DataError, match="--seq-length is 0"):
        call(inspect, corpus([10], "b").prefix, "--seq-length", "0")


def test_inspect_draws_a_picture(corpus, said, tmp_path):
    pytest.importorskip("matplotlib")
    prefix = corpus([3, 5, 90, 1000]).prefix
    for ending, magic in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert call(inspect, prefix, "--picture", str(tmp_path / f"a.{ending}"), "--seq-length", "64") == 0
        assert (tmp_path / f"a.{ending}").read_bytes().startswith(magic)
    with pytest.raises(DataError, match=r"end its name in \.png, \.svg or \.pdf"):
        call(inspect, prefix, "--picture", str(tmp_path / "a.txt"))


def test_merge(corpus, said, tmp_path):
    a, b = corpus([3, 0, 4], "a"), corpus([5], "b")
    assert call(merge, a.prefix, b.prefix, "--output-prefix", str(tmp_path / "ab")) == 0
    merged = IndexedDataset(tmp_path / "ab")
    assert [part.tolist() for part in merged] == [part.tolist() for source in (a, b) for part in source]
    assert merged.num_documents == 4 and "4 documents, 12 tokens" in said.text
    with pytest.raises(DataError, match="exists"):
        call(merge, a.prefix, b.prefix, "--output-prefix", str(tmp_path / "ab"))
    with pytest.raises(DataError, match="two or more"):
        call(merge, a.prefix, "--output-prefix", str(tmp_path / "x"))


def test_inspect_warns_of_a_sorted_corpus(corpus, said):
    lengths = np.random.default_rng(0).integers(1, 50, 400)
    call(inspect, corpus(lengths, "shuffled").prefix)
    assert "looks sorted" not in said.text
    call(inspect, corpus(np.sort(lengths), "sorted").prefix)
    assert "sorted looks sorted" in said.text
    assert not document_lengths.looks_sorted(np.full(400, 7))
    assert document_lengths.looks_sorted(np.concatenate([lengths, 3 * lengths]))


def test_verify_accepts_a_good_corpus(corpus, said):
    assert call(verify, corpus([97, 0, 100]).prefix, "--vocab-size", "197") == 0
    assert "3 documents, 197 tokens, all in order" in said.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: patch(p + ".idx", HEADER.size + 4, np.int32(31)), "sequence 2 has length 10 at byte 60, .* byte 82"),
        (lambda p: patch(p + ".idx", HEADER.size + 12 + 8, np.int64(22)), "sequence 1 has length 20 at byte 22"),
        (lambda p: patch(p + ".idx", HEADER.size + 12 + 24 + 8, np.int64(3)), "document 1 ends before it begins"),
        (lambda p: patch(p + ".bin", 70, np.uint16(500)), r"token 35 \(document 2\) is 500, .* below 40"),
    ],
)
def test_verify_finds_damage(corpus, said, damage, message):
    prefix = corpus([10, 20, 10]).prefix
    damage(prefix)
    assert call(verify, prefix, "--vocab-size", "40") == 1
    assert re.search(message, said.text)


def test_explain_names_what_the_step_reads(corpus, said):
    data = corpus([30, 30, 30, 10])
    flags = ["--seq-length", "8", "--global-batch-size", "4", "--split", "1", "--tokenizer-type", "ByteTokenizer"]
    assert call(explain, data.prefix, "--step", "3", *flags) == 0
    assert "step 3 reads samples 8 to 11" in said.text
    dataset = GPTDataset(data, (0, 4), 8, seed=1234)
    for k in range(8, 12):
        tokens = dataset.sample(k).tokens(0, 8)
        [line] = [message for message in said.messages if message.startswith(f"sample {k}: corpus, epoch {k // 12}: ")]
        assert f"tokens {tokens[0]}-" in line and f"-{tokens[-1]} " in line
        assert f"document {data.document_at(int(tokens[0]))} token {tokens[0] % 30}" in line
    with pytest.raises(DataError, match="no --load"):
        call(explain, "--step", "3")
    with pytest.raises(DataError, match="--step is 0"):
        call(explain, data.prefix, "--step", "0", *flags)


def test_explain_shows_both_ends_of_a_sample_that_wraps(corpus):
    data: IndexedDataset = corpus([6, 4])
    dataset = GPTDataset(data, (0, 2), 10, seed=1234)
    epoch = next(k for k in range(20) if dataset.sample(k).tokens(0, 1)[0] == 7)
    expected = (
        "tokens 7-9 = document 1 token 1 to document 1 token 3, then tokens 0-6 = document 0 token 0 to document 1"
    )
    assert explain.describe(dataset, epoch).startswith(f"sample {epoch}: corpus, epoch {epoch}: {expected}")
