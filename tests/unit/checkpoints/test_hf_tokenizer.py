"""Every kind of tokenizer on its way to transformers and back, and models without one."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megasp.checkpoints.hf_tokenizer import carry, write_tokenizer
from megasp.checkpoints.hugging_face import from_hf, to_hf
from megasp.config.schema import DataConfig
from megasp.data import TokenizerOptions
from tests.unit.checkpoints.families import make
from tests.unit.checkpoints.test_hugging_face import LLAMA, saved

transformers = pytest.importorskip("transformers")

TEXT = "the cat's mat, naïve 文字  two"


def _train(folder: Path, **options: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "a.txt").write_text("\n".join(["the cat's mat", "naïve 文字", "one two three"] * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "a.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2, pad_id=-1, character_coverage=1.0, **options,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama 2's: text is encoded as it is."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    return _train(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)


def test_sentencepiece_that_normalizes_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megasp"), "propagate", True)
    (tmp_path / "out").mkdir()
    data = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(_train(tmp_path)))
    with caplog.at_level(logging.WARNING, "megasp"):
        write_tokenizer(tmp_path / "out", data, 300, None, 64)
    assert "normalizes text before it encodes it" in caplog.text


def test_sentencepiece(tmp_path: Path, sentencepiece_model: Path) -> None:
    data = {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": str(sentencepiece_model)}
    saved(tmp_path / "ckpt", LLAMA, data=data)
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf")
    ours = TokenizerOptions(**data).build()
    assert ours is not None and (output / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    assert theirs(TEXT)["input_ids"] == ours.encode_batch([TEXT])[0].tolist()
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT and theirs.model_max_length == 16384
    assert transformers.GenerationConfig.from_pretrained(output).eos_token_id == ours.eod == theirs.eos_token_id


def test_sentencepiece_there_and_back(tmp_path: Path, sentencepiece_model: Path) -> None:
    """A model of Hugging Face's with tokenizer.model alone, as Llama 2 was published."""
    make("llama", tmp_path / "hf", vocab_size=300)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "own": 1}')
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["own"] == 1


def _tiktoken(folder: Path) -> DataConfig:
    tokens = [bytes([byte]) for byte in range(256)]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "x.tiktoken").write_bytes(b"\n".join(lines))
    return DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(folder / "x.tiktoken"))


OTHERS: dict[str, Any] = {
    "TikTokenizer": _tiktoken,
    "NullTokenizer": lambda folder: DataConfig(tokenizer_type="NullTokenizer", tokenizer_model="299"),
    "ByteTokenizer": lambda folder: DataConfig(tokenizer_type="ByteTokenizer"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_said(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has no such tokenizer: the model is written without one, and says which id ends a document."""
    monkeypatch.setattr(logging.getLogger("megasp"), "propagate", True)
    data, folder = OTHERS[kind](tmp_path), tmp_path / "out"
    folder.mkdir()
    with caplog.at_level(logging.INFO, "megasp"):
        eod = write_tokenizer(folder, data, 300, None, 64)
    assert not any(folder.iterdir()) and f"transformers reads none of the kind {kind}" in caplog.text
    tokenizer = TokenizerOptions(
        tokenizer_type=kind, tokenizer_model=data.tokenizer_model, vocab_size=299 if kind == "NullTokenizer" else None
    ).build()
    assert tokenizer is not None and eod == tokenizer.eod


def test_a_model_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megasp"), "propagate", True)
    make("llama", tmp_path / "hf")
    with caplog.at_level(logging.INFO, "megasp"):
        from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert f"{tmp_path}/hf has no tokenizer.json: give --tokenizer-model where one is needed" in caplog.text
    output = to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert not list(output.glob("tokenizer*"))
    assert json.loads((output / "config.json").read_text())["eos_token_id"] is None
    (tmp_path / "empty").mkdir()
    assert not carry(tmp_path / "hf", tmp_path / "empty", tmp_path)
