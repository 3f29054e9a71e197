import json
from pathlib import Path

import pytest

from megasp.data import ByteTokenizer, IndexedDataset, encoding
from megasp.data.preprocess import Options, run
from megasp.errors import DataError

LINES = [{"text": "first", "title": "A"}, {"text": "zwei ü", "title": "B"}, {"text": "third one", "title": ""}]


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def process(tmp_path: Path, *inputs: Path, name: str = "out/corpus", **options) -> IndexedDataset:
    options = {"tokenizer_type": "ByteTokenizer", "workers": 1, "json_keys": ("text",), **options}
    assert run(Options(input=inputs, output_prefix=str(tmp_path / name), **options)) == 0
    return IndexedDataset(tmp_path / f"{name}_{options['json_keys'][0]}_document")


def texts(corpus: IndexedDataset) -> list[str]:
    return [ByteTokenizer().decode(sequence) for sequence in corpus]


def test_json_lines(tmp_path):
    corpus = process(tmp_path, write_lines(tmp_path / "a.jsonl", LINES), append_eod=True)
    assert texts(corpus) == ["first", "zwei ü", "third one"]
    assert corpus.dtype == "uint16" and corpus.num_documents == 3
    assert all(sequence[-1] == 256 for sequence in corpus)


def test_several_keys_and_empty_documents(tmp_path, caplog):
    caplog.set_level("INFO", "megasp")
    corpus = process(tmp_path, write_lines(tmp_path / "a.jsonl", LINES), json_keys=("title", "text"))
    assert texts(corpus) == ["A", "B"]
    assert texts(IndexedDataset(tmp_path / "out/corpus_text_document")) == ["first", "zwei ü", "third one"]
    assert "left out 1 empty documents" in caplog.text
    assert "next: megasp data inspect" in caplog.text


def test_directories_are_read_in_order(tmp_path):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "b" / "x.py").write_text("import b")
    (source / "c.md").write_text("# c")
    (source / "a.txt").write_text(" \n")
    (source / "image.png").write_text("no text")
    (source / ".git" / "config.txt").write_text("hidden")
    extra = tmp_path / "named.dat"
    extra.write_text("named")
    assert texts(process(tmp_path, extra, source)) == ["named", "import b", "# c"]
    assert texts(process(tmp_path, source, name="png", extensions=(".png",))) == ["no text"]


def test_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 100)
    entries = [{"text": "word " * (i % 17)} for i in range(200)]
    source = write_lines(tmp_path / "a.jsonl", entries)
    with source.open("a") as file:
        file.write("{bad\n")
    for workers in (1, 2):
        process(tmp_path, source, name=f"w{workers}", workers=workers, append_eod=True, skip_bad_lines=True)
        with pytest.raises(DataError, match=r"a\.jsonl, line 201: malformed JSON"):
            process(tmp_path, source, name="bad", workers=workers)
    for ending in ("bin", "idx"):
        one, two = ((tmp_path / f"w{workers}_text_document.{ending}").read_bytes() for workers in (1, 2))
        assert one == two
    assert not list(tmp_path.glob("*bad*")) + list(tmp_path.glob(".*partial"))


BAD_LINES = {
    "malformed": (b'{"text": "a"', r"line 2: malformed JSON \(.* at column 13\)"),
    "no object": (b'["text"]', "line 2: found a list"),
    "missing key": (b'{"body": "a", "id": 1}', "line 2: found keys 'body', 'id': .*'text'.*--json-keys"),
    "not a string": (b'{"text": 5}', "line 2: found keys 'text'"),
    "not UTF-8": (b'{"text": "\xff"}', "line 2: not UTF-8"),
    "half a pair": (b'{"text": "\\ud800"}', "line 2: not UTF-8"),
    "too deep": (b"[" * 100000, "line 2: unreadable JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_an_error_or_counted(tmp_path, case, caplog):
    line, message = BAD_LINES[case]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": "two"}\n')
    with pytest.raises(DataError, match=message) as error:
        process(tmp_path, source)
    assert str(source) in error.value.got and "--skip-bad-lines" in error.value.fix
    assert not list((tmp_path / "out").iterdir())
    assert texts(process(tmp_path, source, skip_bad_lines=True)) == ["one", "two"]
    assert "left out 1 of 4 documents" in caplog.text


def test_a_text_file_that_is_not_utf8(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xef\xbb\xbfbyte order mark")
    (source / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8"):
        process(tmp_path, source)
    assert texts(process(tmp_path, source, skip_bad_lines=True)) == ["byte order mark"]


def test_ids_beyond_the_vocabulary_name_the_line(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "1 2"}, {"text": "3 12"}])
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 10}
    with pytest.raises(
        DataError, match=r"line 2: token id 12 is beyond the vocabulary: .* \[0, 11\); raise --vocab-size"
    ):
        process(tmp_path, source, **null)
    assert process(tmp_path, source, **{**null, "vocab_size": 70000})[1].tolist() == [3, 12]


def test_bad_arguments_leave_nothing_behind(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", LINES)
    blank = write_lines(tmp_path / "blank.jsonl", [{"text": " "}])
    (tmp_path / "archive.jsonl.gz").touch()
    (tmp_path / "empty").mkdir()
    process(tmp_path, source, name="taken")
    before = sorted(tmp_path.rglob("*"))
    for message, inputs, options in [
        ("taken_text_document.bin exists", [source], {"name": "taken"}),
        ("missing.jsonl does not exist", [tmp_path / "missing.jsonl"], {}),
        ("no documents at all for .*0 read", [tmp_path / "archive.jsonl.gz"], {"name": "empty"}),
        ("no documents at all in .*--extensions", [tmp_path / "empty"], {}),
        ("no documents at all for .*1 read", [blank], {"name": "blank"}),
        ("cannot write to .*a.jsonl", [source], {"name": "a.jsonl/x"}),
        ("--workers is -1", [source], {"workers": -1}),
        ("no tokenizer is named", [source], {"tokenizer_type": None}),
        ("no tokenizer at", [source], {"tokenizer_type": None, "tokenizer_model": str(tmp_path / "none.json")}),
    ]:
        with pytest.raises(DataError, match=message):
            process(tmp_path, *inputs, **options)
    assert sorted(tmp_path.rglob("*")) == before
