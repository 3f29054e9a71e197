"""Tokenizers from other vocabulary files: GPT-2's vocab.json and merges.txt, SentencePiece's .model, tiktoken's."""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megasp.data.fast_bpe import GPT2_PATTERN
from megasp.data.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, last_cut_between_words, same_ids
from megasp.errors import DataError

TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": GPT2_PATTERN,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s",
}
"""What splits text before the merges: Megatron-LM's v1 and v2, OpenAI's for GPT-2 and for GPT-4."""
MEGATRON_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """GPT-2's byte-level BPE from its two files; ends a document with <|endoftext|>.

    Args:
        vocab_file: vocab.json, token -> id.
        merge_file: merges.txt, a rule a line.
    """

    def __init__(self, vocab_file: str | Path, merge_file: str | Path, eod_token: str | None = None) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        for path in (vocab_file, merge_file):
            if not Path(path).is_file():
                raise DataError(
                    f"{path} does not exist", "GPT2BPETokenizer reads vocab.json and merges.txt", "check it"
                )
        try:
            backend = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
        except Exception as error:  # the backend raises bare Exception for every malformed file
            rule = f"they must be GPT-2's vocab.json and merges.txt ({error})"
            raise DataError(f"{vocab_file} and {merge_file} cannot be read", rule, "check both files") from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        known = [token for token in (eod_token, *END_OF_TEXT) if token and backend.token_to_id(token) is not None]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in known[:1]])
        self._use(backend, known[:1], str(vocab_file))


class SentencePieceTokenizer:
    """A SentencePiece .model; ends a document with its </s>.

    Special pieces in a text (<s>, </s>) are text; blanks and line ends are as the model's normalisation leaves them.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None) -> None:
        try:
            import sentencepiece
        except ImportError:
            rule = "it needs the package sentencepiece"
            raise DataError("GPTSentencePieceTokenizer", rule, "pip install sentencepiece") from None
        if not Path(path).is_file():
            raise DataError(f"no tokenizer at {path}", "it must be a SentencePiece .model", "check the path")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path} cannot be read", f"it must be a SentencePiece .model ({error})", "check it"
            ) from None
        self.vocab_size = self._model.get_piece_size()
        self.eod = self._model.piece_to_id(eod_token) if eod_token else self._model.eos_id()
        if self.eod < 0 or (eod_token and self._model.id_to_piece(self.eod) != eod_token):
            got = f"{path} has no {eod_token or 'end-of-sequence piece'}"
            raise DataError(got, "one piece must end a document", "name one of its pieces by --eod-token")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int64) for ids in self._model.encode(list(texts))]

    def last_cut(self, text: str) -> int:
        return 0  # its normalisation and its search for the best pieces know the whole text

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(id) for id in ids])


class TikTokenizer:
    """A vocabulary for tiktoken: Megatron-LM's JSON of {rank, token_bytes}, or OpenAI's `BASE64 RANK` lines.

    Megatron-LM's begins with 1000 special tokens, of which </s> ends a document; OpenAI's file holds none, and one id
    more than its ranks ends a document.

    Args:
        pattern: a name in TIKTOKEN_PATTERNS.
        vocab_size: ids to keep, the special ones included; all without it.
        special_tokens: how many special ids Megatron-LM's file is preceded by.
    """

    def __init__(
        self, path: str | Path, pattern: str = "v2", vocab_size: int | None = None, special_tokens: int = 1000
    ) -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError("TikTokenizer", "it needs the package tiktoken", "pip install tiktoken") from None
        try:
            content = Path(path).read_bytes()
            tokens = _tiktoken_tokens(content)
        except OSError as error:
            raise DataError(f"no tokenizer at {path}", f"it must be readable ({error.strerror})", "check it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            rule = f"it must be a JSON list of rank and token_bytes, or lines of BASE64 RANK ({error})"
            raise DataError(f"{path} cannot be read", rule, "check it") from None
        if content.lstrip()[:1] == b"[":
            first, self.eod = special_tokens, MEGATRON_SPECIAL_TOKENS.index("</s>")
            tokens = tokens[: None if vocab_size is None else vocab_size - first]
            self.vocab_size = first + len(tokens)
        else:
            first, self.eod = 0, len(tokens)
            self.vocab_size = len(tokens) + 1
        ranks = {token: first + rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            str(path), pat_str=TIKTOKEN_PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )
        self._first = first

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64) for text in texts]

    def last_cut(self, text: str) -> int:
        return last_cut_between_words(text, lambda window, at: same_ids(self, window, at))

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(id) for id in ids if int(id) != self.eod and int(id) >= self._first]
        return self._encoding.decode(plain)


def _tiktoken_tokens(content: bytes) -> list[bytes]:
    """The bytes of each token in the order of ranks, which must run from 0 without a gap."""
    if content.lstrip()[:1] == b"[":
        pairs = [(entry["rank"], base64.b64decode(entry["token_bytes"])) for entry in json.loads(content)]
    else:
        lines = (line.split() for line in content.splitlines() if line.strip())
        pairs = [(int(rank), base64.b64decode(token)) for token, rank in lines]
    pairs.sort()
    if [rank for rank, _ in pairs] != list(range(len(pairs))) or not pairs:
        raise ValueError("ranks must run from 0 without a gap")
    return [token for _, token in pairs]
