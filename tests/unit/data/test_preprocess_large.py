"""Preprocessing of large and packed input: compression, stdin, arrays, long documents, shuffling, kills."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megasp.data import (
    HuggingFaceTokenizer,
    IndexedDataset,
    chunks,
    indexed_dataset_builder,
    long_lines,
    preprocess,
    shuffle,
)
from megasp.data import text_files as files
from megasp.data.preprocess import Options, run
from megasp.data.train_tokenizer import Options as TrainingOptions
from megasp.data.train_tokenizer import run as train
from megasp.errors import DataError
from tests.unit.data.test_preprocess import process, texts, write_lines

WORDS = ["the", "cat", "naïve", "文字", "12", "don't", "\n", "mat.\n", "<|endoftext|>", "x_1"]


@pytest.fixture
def words():
    return random.Random(0)


def test_compressed_files_and_stdin(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(40)]
    source = tmp_path / "in"
    source.mkdir()
    content = [b"".join(line.encode() for line in lines[i::5]) for i in range(5)]
    (source / "0.jsonl").write_bytes(content[0])
    (source / "1.jsonl.gz").write_bytes(gzip.compress(content[1]))
    # several frames, as parallel compressors write them
    half = content[2].index(b"\n") + 1
    frames = [zstandard.compress(part) for part in (content[2][:half], content[2][half:])]
    (source / "2.jsonl.zst").write_bytes(b"".join(frames))
    (source / "3.jsonl.bz2").write_bytes(bz2.compress(content[3]))
    (source / "4.jsonl.xz").write_bytes(lzma.compress(content[4]))
    expected = [json.loads(line)["text"] for i in range(5) for line in lines[i::5]]
    assert texts(process(tmp_path, source)) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content[0])))
    assert texts(process(tmp_path, Path("-"), name="stdin")) == expected[:8]
    (source / "1.jsonl.gz").write_bytes(gzip.compress(content[1])[:-30])
    with pytest.raises(DataError, match=r"cannot read .*1\.jsonl\.gz"):
        process(tmp_path, source, name="cut")


def test_arrays_of_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART", 7)
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "append_eod": True}
    np.save(tmp_path / "rows.npy", np.arange(40, dtype=np.uint16).reshape(2, 20))
    np.save(tmp_path / "one.npy", np.arange(15))
    made = process(tmp_path, tmp_path / "rows.npy", tmp_path / "one.npy", **null)
    assert [row.tolist() for row in made] == [[*range(20), 100], [*range(20, 40), 100], [*range(15), 100]]
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "large.npy", np.array([[1, 2], [3, 101]]))
    for name, options, message in [
        ("float.npy", null, "holds float64 of shape"),
        ("large.npy", null, r"large\.npy, line 2: token id 101"),
        ("one.npy", {}, "NullTokenizer"),
    ]:
        with pytest.raises(DataError, match=message):
            process(tmp_path, tmp_path / name, name="bad", **options)


def test_a_document_with_a_bad_part_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART", 7)
    ids = np.arange(60).reshape(3, 20)
    ids[1, 3] = 101  # in the first of three parts
    np.save(tmp_path / "rows.npy", ids)
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "skip_bad_lines": True}
    made = process(tmp_path, tmp_path / "rows.npy", **null)
    assert [row.tolist() for row in made] == [ids[0].tolist(), ids[2].tolist()]


def test_a_document_in_parts_ends_under_its_own_key_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART", 7)
    np.save(tmp_path / "rows.npy", np.arange(20))
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "append_eod": True}
    with pytest.raises(DataError, match=r"no documents at all for .*summary"):  # and none that is an end alone
        process(tmp_path, tmp_path / "rows.npy", json_keys=("text", "summary"), **null)


@pytest.mark.parametrize("kind", ["text", "json"])
def test_ids_of_a_long_document_are_those_of_the_whole(tmp_path, monkeypatch, words, kind):
    text = " ".join(words.choices(WORDS, k=20_000))
    (tmp_path / "long.txt").write_text(text)
    train(TrainingOptions(input=(tmp_path / "long.txt",), vocab_size=400, output=str(tmp_path / "tok")))
    model = str(tmp_path / "tok" / "tokenizer.json")
    [expected] = HuggingFaceTokenizer(model).encode_batch([text])
    monkeypatch.setattr(files, "LONG", 5000)
    monkeypatch.setattr(files, "PART", 3000)
    monkeypatch.setattr(long_lines, "LONG", 1000)
    source = tmp_path / "long.txt"
    if kind == "json":
        source = write_lines(tmp_path / "long.jsonl", [{"text": text}, {"text": "short"}])
    parts = list(files.read_documents([source], ["text"], HuggingFaceTokenizer(model).last_cut))
    assert len(parts) > 20 and sum(part.ends for part in parts) == 1 + (kind == "json")
    made = process(tmp_path, source, tokenizer_type=None, tokenizer_model=model)
    np.testing.assert_array_equal(made[0], expected)


def test_a_long_document_that_turns_out_bad_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONG", 50)
    monkeypatch.setattr(files, "PART", 30)
    (tmp_path / "a.txt").write_text("good " * 50)
    (tmp_path / "b.txt").write_bytes(b"good " * 50 + b"\xff" + b" more" * 50)
    (tmp_path / "c.txt").write_text("fine " * 50)
    inputs = [tmp_path / f"{name}.txt" for name in "abc"]
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8"):
        process(tmp_path, *inputs)
    assert texts(process(tmp_path, *inputs, skip_bad_lines=True)) == ["good " * 50, "fine " * 50]


def test_a_long_json_line_that_turns_out_bad_leaves_nothing(tmp_path, monkeypatch):
    for module, name, size in ((files, "LONG", 50), (files, "PART", 30), (long_lines, "LONG", 10)):
        monkeypatch.setattr(module, name, size)
    good = json.dumps({"meta": {"text": "not this one" * 9}, "text": "good " * 50, "url": "u" * 90})
    bad = {
        "malformed JSON": good[:-1],
        "found keys 'meta', 'url'": json.dumps({"meta": "m" * 100, "url": "u" * 90}),
        "not UTF-8": good.encode().replace(b"good good", b"good \xff", 1),
        "malformed JSON .*Invalid": good.replace("good good", "good \\q", 1),
        "malformed JSON .*control character": good.replace("good good", "good \t", 1),
    }
    for number, (message, line) in enumerate(bad.items()):
        line = line if isinstance(line, bytes) else line.encode()
        (tmp_path / "a.jsonl").write_bytes(good.encode() + b"\n" + line + b"\n" + good.encode())
        with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
            process(tmp_path, tmp_path / "a.jsonl")
        made = process(tmp_path, tmp_path / "a.jsonl", name=f"skipped{number}", skip_bad_lines=True)
        assert texts(made) == ["good " * 50] * 2


def test_a_document_beyond_31_bits_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset_builder, "LONGEST", 20)
    with pytest.raises(DataError, match="document 1 has more than 20 tokens"):
        process(tmp_path, write_lines(tmp_path / "a.jsonl", [{"text": "a" * 20}, {"text": "b" * 21}]))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, tokens):
        raise OSError(28, "No space left on device", "corpus.bin")

    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(indexed_dataset_builder.IndexedDatasetBuilder, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        process(tmp_path, source, name="corpus")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("buffer", [100, 1 << 20])
def test_shuffle_is_a_permutation_that_neither_buffer_nor_chunks_change(tmp_path, monkeypatch, buffer):
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"{i} " * (i % 7 + 1)} for i in range(200)])
    plain = texts(process(tmp_path, source, name="plain"))
    whole = texts(process(tmp_path, source, name="whole", shuffle=True))
    monkeypatch.setattr(shuffle, "BUFFER", buffer)
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 500)
    shuffled = texts(process(tmp_path, source, name=f"b{buffer}", shuffle=True))
    assert shuffled == whole != plain and sorted(shuffled) == sorted(plain)
    assert texts(process(tmp_path, source, name="other", shuffle=True, shuffle_seed=1)) != shuffled
    monkeypatch.setattr(shuffle, "LONG", 9)
    assert texts(process(tmp_path, source, name="long", shuffle=True)) == whole


def die_at(event: int, options: Options) -> bool:
    """Run in a child that is killed at its `event`-th write, commit or rename; whether it lived."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    count = 0

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    builder = indexed_dataset_builder.IndexedDatasetBuilder
    builder.extend_document = counted(builder.extend_document)
    builder.add_document = counted(builder.add_document)
    builder.add_index = counted(builder.add_index)
    chunks.AtomicFiles.commit = counted(chunks.AtomicFiles.commit)
    Path.replace = counted(Path.replace)
    try:
        run(options)
    finally:
        os._exit(0 if count < event else 1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, monkeypatch, words, shuffled):
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 300)
    entries = [{"text": f"{i} " * words.randint(0, 20), "title": f"t{i}"} for i in range(60)]
    source = write_lines(tmp_path / "a.jsonl", entries)
    keys = {"json_keys": ("text", "title"), "shuffle": shuffled, "append_eod": True}
    process(tmp_path, source, name="unbroken", **keys)
    for round in range(15):
        prefix = tmp_path / f"killed{round}"
        options = Options(input=(source,), output_prefix=str(prefix), tokenizer_type="ByteTokenizer", workers=1, **keys)
        while not die_at(words.randint(1, 150), options):  # until one attempt comes through
            pass
        for key in keys["json_keys"]:
            for ending in ("bin", "idx"):
                ours, unbroken = (
                    (tmp_path / f"{name}_{key}_document.{ending}").read_bytes() for name in (prefix.name, "unbroken")
                )
                assert ours == unbroken, (round, key, ending)
    assert not [path for path in tmp_path.iterdir() if "preprocess" in path.name or "partial" in path.name]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "word " * 200}] * 50_000)
    flags = [
        "--input",
        source,
        "--tokenizer-type",
        "ByteTokenizer",
        "--workers",
        "2",
        "--output-prefix",
        tmp_path / "x",
    ]
    program = [sys.executable, "-m", "megasp.cli", "preprocess", *map(str, flags)]
    parent = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 300
    while len(children) < 3:  # two workers and multiprocessing's resource tracker
        assert parent.poll() is None and time.monotonic() < deadline
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        time.sleep(0.02)
    time.sleep(0.5)  # until they work
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{child}/fd/0").exists() for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.02)


def test_chunks_of_other_input_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CHUNK_BYTES", 50)
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"old {i}"} for i in range(30)])
    options = {"tokenizer_type": "ByteTokenizer", "workers": 1}
    assert not die_at(20, Options(input=(source,), output_prefix=str(tmp_path / "x"), **options))
    assert (tmp_path / "x.preprocess" / "state.json").exists()
    write_lines(source, [{"text": f"new {i}"} for i in range(30)])
    assert texts(process(tmp_path, source, name="x"))[0] == "new 0"
    assert IndexedDataset(tmp_path / "x_text_document").num_documents == 30
