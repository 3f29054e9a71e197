"""GPT-2, SentencePiece and tiktoken vocabularies, and the faster encoder, each against its own library."""

import base64
import json
import os
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasp.data import GPT2BPETokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer, TokenizerOptions
from megasp.data.fast_bpe import FastBPE, merge
from megasp.data.train_tokenizer import Options, run
from megasp.errors import DataError

WORDS = (
    *("the", "cat's", "12", "mats,", "naïve", "🙂", "文字", "don't\n\n ", "def", "f(x):\treturn", "x_1", "-->"),
    *("<|endoftext|>", "aaaa", "aaaaa", "\u3000", "\x85", "½", "Ⅷ", ""),
)
TEXT = " ".join(random.Random(0).choices(WORDS, k=3000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained byte-level BPE as tokenizer.json, vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "a.txt").write_text(TEXT)
    run(Options(input=(folder,), vocab_size=400, output=str(folder)))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    return folder


def test_gpt2_is_transformers(folder):
    transformers = pytest.importorskip("transformers")
    vocab, merges = (folder / "vocab.json").read_text(), (folder / "merges.txt").read_text()
    rules = [tuple(line.split(" ")) for line in merges.splitlines()[1:]]
    theirs = transformers.GPT2TokenizerFast(vocab=json.loads(vocab), merges=rules)
    ours = GPT2BPETokenizer(folder / "vocab.json", folder / "merges.txt")
    [ids] = ours.encode_batch([TEXT])
    assert ids.tolist() == theirs(TEXT)["input_ids"] and ours.decode(ids) == TEXT
    assert ours.decode([ours.eod]) == "<|endoftext|>" and ours.vocab_size == len(json.loads(vocab))


@pytest.fixture(scope="module")
def both(folder):
    slow = HuggingFaceTokenizer(folder)
    fast = FastBPE.of((folder / "tokenizer.json").read_text())
    assert fast is not None
    return slow, fast


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aa  \n'stehcam12")), max_size=60))
def test_the_fast_encoder_gives_the_same_ids(both, text):
    slow, fast = both
    assert fast.encode(text).tolist() == slow.encode_batch([text])[0].tolist()


def test_the_fast_encoder_agrees_on_every_character(both):
    """The two libraries' regular expressions come from different authors: compare all characters in four contexts.

    Of what no version of Unicode has assigned, and of private use beyond the first plane, one in 64 is compared."""
    slow, fast = both
    step = 1 if os.environ.get("MEGASP_FULL_MATRIX") == "1" else 64
    codes = {*range(0x34000), *range(0x34000, sys.maxunicode + 1, step), *range(0xE0000, 0xE1000)}
    characters = [chr(c) for c in sorted(codes) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 100_000):
        text = "".join(f"a{c}1{c}  {c}.{c}\n" for c in characters[start : start + 100_000])
        np.testing.assert_array_equal(fast.encode(text), slow._backend.encode(text).ids)


def test_large_batches_take_the_fast_encoder_and_special_tokens_the_other(folder, both):
    tokenizer = HuggingFaceTokenizer(folder)
    texts = [TEXT.replace("<|endoftext|>", "") * 10, TEXT]
    found = tokenizer.encode_batch(texts)
    assert tokenizer._fast is not None and tokenizer._fast.encode(TEXT) is None
    for text, ids in zip(texts, found, strict=True):
        np.testing.assert_array_equal(ids, both[0]._backend.encode(text).ids)


def test_where_ids_would_differ_there_is_no_fast_encoder(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())

    def of(**changes):
        return FastBPE.of(json.dumps(settings | changes))

    assert of() is not None
    assert of(normalizer={"type": "NFC"}) is None
    assert of(pre_tokenizer=settings["pre_tokenizer"] | {"add_prefix_space": True}) is None
    assert of(model=settings["model"] | {"type": "WordPiece"}) is None
    assert of(model=settings["model"] | {"dropout": 0.1}) is None
    # "abc" from a + bc, though ab is merged before: tiktoken would find abc where this tokenizer does not
    letters = settings["model"]["vocab"] | {"ab": 500, "bc": 501, "abc": 502}
    merges = [["a", "b"], ["b", "c"], ["a", "bc"]]
    assert of(model=settings["model"] | {"vocab": letters, "merges": merges}) is None
    merges = [["a", "b"], ["ab", "c"]]
    assert of(model=settings["model"] | {"vocab": letters, "merges": merges}) is not None


def test_merging_by_rank():
    ranks = {b"ab": 0, b"bc": 1, b"abc": 2}
    assert merge(b"abcbc", ranks) == [b"abc", b"bc"] and merge(b"", ranks) == []


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nthe rat sat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=16, minloglevel=2
    )
    model = str(tmp_path / "sp.model")
    ours = TokenizerOptions(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=model).build()
    theirs = sentencepiece.SentencePieceProcessor(model_file=model)
    assert (ours.vocab_size, ours.eod) == (16, theirs.eos_id())
    [ids, empty] = ours.encode_batch(["the cat </s>", ""])
    assert ids.tolist() == theirs.encode("the cat </s>") and not len(empty)
    assert ours.decode(ours.encode_batch(["the mat"])[0]) == "the mat"
    assert SentencePieceTokenizer(model, "▁").eod == theirs.piece_to_id("▁")
    with pytest.raises(DataError, match="has no <end>"):
        SentencePieceTokenizer(model, "<end>")
    (tmp_path / "bad.model").write_text("{}")
    for name, message in [("bad.model", "cannot be read"), ("none.model", "no tokenizer at")]:
        with pytest.raises(DataError, match=message):
            SentencePieceTokenizer(tmp_path / name)


@pytest.fixture
def tokens(folder):
    fast = FastBPE.of((folder / "tokenizer.json").read_text())
    return [fast._encoding.decode_single_token_bytes(rank) for rank in range(fast._encoding.max_token_value + 1)]


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_is_megatrons(tmp_path, tokens, pattern):
    library = pytest.importorskip("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(entries))
    size = 1000 + len(tokens)
    theirs = library.TikTokenTokenizer(str(path), pattern=pattern, vocab_size=size)
    ours = TikTokenizer(path, pattern)
    [ids] = ours.encode_batch([TEXT])
    assert ids.tolist() == theirs.tokenizer.encode(TEXT, disallowed_special=())
    assert (ours.vocab_size, ours.eod, ours.decode(ids)) == (size, theirs._eos_id, TEXT)
    assert TikTokenizer(path, pattern, vocab_size=size - 9).vocab_size == size - 9


def test_tiktoken_lines(tmp_path, tokens):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    ours = TikTokenizer(path, "gpt2")
    [ids] = ours.encode_batch([TEXT])
    assert ours.decode([*ids, ours.eod]) == TEXT and ours.eod == len(tokens) == ours.vocab_size - 1
    for content, message in [(b"YQ== 1\n", "without a gap"), (b"x y z", "cannot be read"), (b"[5]", "cannot be read")]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            TikTokenizer(path)
