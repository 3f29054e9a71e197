import json

import pytest

from megasp.data import ByteTokenizer, HuggingFaceTokenizer, NullTokenizer, TokenizerOptions, build_tokenizer
from megasp.data.train_tokenizer import Options, run
from megasp.errors import DataError

TEXTS = ["def f(x):\n    return x\n", "naïve 🙂 文字", "", "  two  spaces "]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Path of a small BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("the cat sat on the mat, the cat ate the rat. " * 20)
    assert run(Options(input=(folder,), vocab_size=270, output=str(folder))) == 0
    return folder / "tokenizer.json"


def test_trained_tokenizer_round_trips_any_text(trained):
    tokenizer = HuggingFaceTokenizer(trained)
    assert tokenizer.vocab_size == 270 and tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    [ids] = tokenizer.encode_batch(["the cat"])
    assert len(ids) < 7


def test_agrees_with_transformers(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained))
    ours = HuggingFaceTokenizer(trained.parent)
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == theirs(TEXTS, add_special_tokens=False)["input_ids"]


def test_truncation_and_padding_of_the_file_are_ignored(trained, tmp_path):
    settings = json.loads(trained.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    settings["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


def test_training_reads_json_lines_and_refuses_to_overwrite(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "hello hello hello"}) + "\n{broken\n")
    options = {"vocab_size": 260, "output": str(tmp_path / "new" / "tok.json"), "json_keys": ("body",)}
    with pytest.raises(DataError, match=r"a.jsonl, line 2: malformed JSON"):
        run(Options(input=(tmp_path,), **options))
    assert not list((tmp_path / "new").iterdir())
    run(Options(input=(tmp_path,), **options, skip_bad_lines=True))
    before = (tmp_path / "new" / "tok.json").read_bytes()
    with pytest.raises(DataError, match="exists"):
        run(Options(input=(tmp_path,), **options, skip_bad_lines=True))
    run(Options(input=(tmp_path,), **options, skip_bad_lines=True, overwrite=True))
    assert (tmp_path / "new" / "tok.json").read_bytes() == before
    with pytest.raises(DataError, match=r"--vocab-size is 256: .*use 257 or more"):
        run(Options(input=(tmp_path,), vocab_size=256, output=str(tmp_path / "x")))


def test_end_of_document_follows_the_config_beside_it(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert HuggingFaceTokenizer(tmp_path).decode([HuggingFaceTokenizer(tmp_path).eod]) == "!"
    other = HuggingFaceTokenizer(tmp_path, eod_token="the")
    assert other.decode([other.eod]) == "the"
    with pytest.raises(DataError, match=r"none of the tokens <end>.*--eod-token"):
        HuggingFaceTokenizer(tmp_path, eod_token="<end>")


def test_bytes():
    tokenizer = ByteTokenizer()
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode([*ids, tokenizer.eod]) for ids in encoded] == TEXTS
    assert encoded[0].tolist() == list(TEXTS[0].encode())


def test_null():
    tokenizer = NullTokenizer(100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    [ids] = tokenizer.encode_batch(["5 0\n99"])
    assert ids.tolist() == [5, 0, 99] and tokenizer.decode(ids) == "5 0 99"
    for text, message in [("1 101", "token id 101"), ("-1", "token id -1"), ("1 x", "'x'"), ("9" * 30, "'999")]:
        with pytest.raises(DataError, match=message):
            tokenizer.encode_batch([text])


def test_built_by_name(trained, tmp_path):
    assert isinstance(build_tokenizer("HuggingFaceTokenizer", trained, vocab_size=300), HuggingFaceTokenizer)
    assert isinstance(build_tokenizer("ByteTokenizer"), ByteTokenizer)
    assert build_tokenizer("NullTokenizer", vocab_size=7).eod == 7
    assert TokenizerOptions().build() is None
    assert isinstance(TokenizerOptions(tokenizer_model=str(trained)).build(), HuggingFaceTokenizer)
    (tmp_path / "bad.json").write_text("{}")
    for arguments, message in [
        (("BertTokenizer",), "unknown tokenizer type BertTokenizer.*ByteTokenizer"),
        (("GPT2BPETokenizer",), "give --vocab-file and --merge-file"),
        (("GPTSentencePieceTokenizer",), "without --tokenizer-model"),
        (("HuggingFaceTokenizer",), "without --tokenizer-model"),
        (("HuggingFaceTokenizer", tmp_path), "no tokenizer at .*tokenizer.json"),
        (("HuggingFaceTokenizer", tmp_path / "bad.json"), "bad.json cannot be read"),
        (("NullTokenizer",), "without --vocab-size"),
        (("ByteTokenizer", None, 256), "--vocab-size is 256.*257 or more"),
        (("HuggingFaceTokenizer", trained, 269), "--vocab-size is 269.*270 or more"),
    ]:
        with pytest.raises(DataError, match=message):
            build_tokenizer(*arguments)
