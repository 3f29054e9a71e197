"""Tokenizers: text to token ids and back. Each is a `Tokenizer`; `tokenizer_options` chooses by Megatron-LM's names."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megasp.data.fast_bpe import FastBPE
from megasp.errors import DataError

FAST_BYTES = 100_000
"""Text from which on proving that a faster encoder gives the same ids pays; it takes up to some seconds."""
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

    def last_cut(self, text: str) -> int:
        """The last place at which a long text can be cut into two of which the ids are those of the whole; else 0."""
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
            backend = Backend.from_file(str(file))
        except Exception as error:  # the backend raises bare Exception for every malformed file
            rule = f"it must be a Hugging Face tokenizer.json ({error})"
            raise DataError(f"{file} cannot be read", rule, "check the file") from None
        tokens = [eod_token] if eod_token else [*_eos_token(file.with_name("tokenizer_config.json")), *END_OF_TEXT]
        self._use(backend, tokens, str(file))

    def _use(self, backend: Any, candidates: Sequence[str], name: str) -> None:
        """Set the backend, and the first of the candidates that it knows as the end of a document."""
        self._backend = backend
        self._fast: FastBPE | None = None
        self._proven = False
        self._backend.no_truncation()  # files of encoder models ask for it; it would cut documents short
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)  # ids may have gaps
        ids = [self._backend.token_to_id(token) for token in candidates]
        if all(id is None for id in ids):
            got = f"{name} has none of the tokens {', '.join(candidates or END_OF_TEXT)}"
            raise DataError(got, "one token must end a document", "name it by --eod-token")
        self.eod: int = next(id for id in ids if id is not None)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._proven and sum(map(len, texts)) >= FAST_BYTES:
            self._fast, self._proven = FastBPE.of(self._backend.to_str()), True
        fast = [self._fast.encode(text) if self._fast else None for text in texts]
        rest = [text for text, ids in zip(texts, fast, strict=True) if ids is None]
        slow = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False) if rest else ())
        return [np.array(next(slow).ids, np.int64) if ids is None else ids for ids in fast]

    def last_cut(self, text: str) -> int:
        return last_cut_between_words(text, self._splits) if self._backend.normalizer is None else 0

    def _splits(self, text: str, at: int) -> bool:
        """Whether the pre-tokenizer splits at `at` with and without what lies behind, and the ids are the same."""
        split = self._backend.pre_tokenizer
        if split is None:
            return False
        left, right = (split.pre_tokenize_str(part) for part in (text[:at], text[at:]))
        shifted = [(piece, (start + at, stop + at)) for piece, (start, stop) in right]
        return split.pre_tokenize_str(text) == [*left, *shifted] and same_ids(self, text, at)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def token(self, id: int) -> str:
        """The text of one id, as the file writes it."""
        return str(self._backend.id_to_token(id))

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        self._backend.save(str(path))


def last_cut_between_words(text: str, splits: Callable[[str, int], bool], window: int = 200, tries: int = 50) -> int:
    """The last place in `text` between a letter or digit and a blank before a letter, where `splits` agrees; else 0.

    No pattern that splits text before the merges has a token across such a place, whatever stands around it; `splits`
    is asked about a window of it, to be sure of this tokenizer.
    """
    for at in range(len(text) - 2, 0, -1):
        if text[at] in " \n" and text[at - 1].isalnum() and text[at + 1].isalpha():
            start = max(0, at - window)
            if splits(text[start : at + window], at - start):
                return at
            tries -= 1
            if not tries:
                break
    return 0


def same_ids(tokenizer: Tokenizer, text: str, at: int) -> bool:
    """Whether the ids of `text` are those of its two sides, cut at `at`, one after the other."""
    whole, left, right = tokenizer.encode_batch([text, text[:at], text[at:]])
    return np.array_equal(whole, np.concatenate([left, right]))


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

    def last_cut(self, text: str) -> int:
        return len(text)

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

    def last_cut(self, text: str) -> int:
        return max(text.rfind(blank) for blank in " \n") + 1

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
        return self.checked(ids)

    def checked(self, ids: np.ndarray) -> np.ndarray:
        """The ids, all of them in the vocabulary."""
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            rule = f"ids must lie in [0, {self.vocab_size})"
            raise DataError(f"token id {outside[0]} is beyond the vocabulary", rule, "raise --vocab-size")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(id)) for id in ids)
