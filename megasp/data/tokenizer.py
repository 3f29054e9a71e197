"""Tokenizers: text to token ids and back. Each is a `Tokenizer`; `build_tokenizer` chooses by Megatron-LM's names."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megasp.config.flags import flag
from megasp.errors import DataError

TYPES = ("HuggingFaceTokenizer", "ByteTokenizer", "NullTokenizer")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back. Adds no special token of its own accord.

    Attributes:
        vocab_size: all ids are below it.
        eod: the id that ends a document.
    """

    vocab_size: int
    eod: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [T]. DataError for text that the tokenizer has no ids for."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class HuggingFaceTokenizer:
    """A `tokenizer.json` as `megasp train-tokenizer` and Hugging Face write it.

    Args:
        path: the file, or a directory that holds it.
        eod_token: the token that ends a document; by default the `eos_token` of a `tokenizer_config.json` beside the
            file, else the first of END_OF_TEXT in the vocabulary.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            rule = "it must be a tokenizer.json or a directory that holds one"
            raise DataError(f"no tokenizer at {file}", rule, "check the path, or make one by `megasp train-tokenizer`")
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the backend raises bare Exception for every malformed file
            rule = f"it must be a Hugging Face tokenizer.json ({error})"
            raise DataError(f"{file} cannot be read", rule, "check the file") from None
        self._backend.no_truncation()  # files of encoder models ask for it; it would cut documents short
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)  # ids may have gaps
        candidates = [eod_token] if eod_token else [*_eos_token(file.with_name("tokenizer_config.json")), *END_OF_TEXT]
        ids = [self._backend.token_to_id(token) for token in candidates]
        if all(id is None for id in ids):
            got = f"{file} has none of the tokens {', '.join(candidates)}"
            raise DataError(got, "one token must end a document", "name it by --eod-token")
        self.eod: int = next(id for id in ids if id is not None)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=False)


def _eos_token(config: Path) -> list[str]:
    """The eos_token that a tokenizer_config.json names, if there is one."""
    try:
        token = json.loads(config.read_bytes()).get("eos_token") if config.is_file() else None
    except ValueError as error:
        raise DataError(f"{config} cannot be read", f"it must be JSON ({error})", "mend or remove it") from None
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if token else []


class ByteTokenizer:
    """UTF-8 bytes 0 to 255, and 256 to end a document. Needs no training."""

    vocab_size, eod = 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        parts = bytes(int(id) for id in ids if id != self.eod)
        return parts.decode("utf-8", errors="replace")


class NullTokenizer:
    """Text that is token ids already, separated by white space. As in Megatron-LM the end of a document is one more id.

    Args:
        vocab_size: of the ids in the text; `self.vocab_size` counts the end of a document too.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eod = vocab_size + 1, vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        words = text.split()
        try:
            ids = np.array([int(word) for word in words], np.int64)
        except (ValueError, OverflowError):
            bad = next(word for word in words if not word.isdecimal() or len(word) > 18)
            fix = "use another --tokenizer-type for plain text"
            raise DataError(
                f"{bad!r} is not a token id", "NullTokenizer reads white-space separated ids", fix
            ) from None
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            rule = f"ids must lie in [0, {self.vocab_size})"
            raise DataError(f"token id {outside[0]} is beyond the vocabulary", rule, "raise --vocab-size")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(id)) for id in ids)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    vocab_size: int | None = None,
    eod_token: str | None = None,
) -> Tokenizer:
    """The tokenizer that the flags --tokenizer-type, --tokenizer-model, --vocab-size and --eod-token name.

    Args:
        vocab_size: the ids of NullTokenizer; for the others an upper bound that theirs must keep.

    Raises:
        DataError: an unknown type, an argument that the type needs is missing, or the vocabulary is too large.
    """
    tokenizer: Tokenizer
    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None:
            raise DataError("HuggingFaceTokenizer without --tokenizer-model", "it needs a tokenizer.json", "name it")
        tokenizer = HuggingFaceTokenizer(tokenizer_model, eod_token)
    elif tokenizer_type == "ByteTokenizer":
        tokenizer = ByteTokenizer()
    elif tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise DataError("NullTokenizer without --vocab-size", "it needs the number of ids", "add --vocab-size N")
        return NullTokenizer(vocab_size)
    else:
        raise DataError(f"unknown tokenizer type {tokenizer_type}", f"known are {', '.join(TYPES)}", "use one of them")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        rule = f"{tokenizer_type} has ids up to {tokenizer.vocab_size - 1}"
        raise DataError(f"--vocab-size is {vocab_size}", rule, f"leave it out, or use {tokenizer.vocab_size} or more")
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Tokenizer."""

    tokenizer_type: str | None = flag(None, "kind of tokenizer; HuggingFaceTokenizer with a model", choices=TYPES)
    tokenizer_model: str | None = flag(None, "tokenizer.json, or a directory that holds one", metavar="PATH")
    vocab_size: int | None = flag(None, "number of token ids; NullTokenizer needs it")
    eod_token: str | None = flag(None, "token that ends a document; the tokenizer's own end of text without it")

    def build(self) -> Tokenizer | None:
        """The tokenizer that the flags name, None if they name none."""
        if self.tokenizer_type is None and self.tokenizer_model is None:
            return None
        kind = self.tokenizer_type or "HuggingFaceTokenizer"
        return build_tokenizer(kind, self.tokenizer_model, self.vocab_size, self.eod_token)
