"""The tokenizer that flags name, by Megatron-LM's names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megasp.config.flags import flag
from megasp.config.tokenizer_types import TIKTOKEN_PATTERNS, TOKENIZER_TYPES
from megasp.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, NullTokenizer, Tokenizer
from megasp.data.vocabulary_tokenizers import GPT2BPETokenizer, SentencePieceTokenizer, TikTokenizer
from megasp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Tokenizer."""

    tokenizer_type: str | None = flag(
        None, "kind of tokenizer; HuggingFaceTokenizer with a model", choices=TOKENIZER_TYPES
    )
    tokenizer_model: str | None = flag(
        None, "tokenizer.json or a directory that holds one, SentencePiece .model, tiktoken vocabulary", metavar="PATH"
    )
    vocab_file: str | None = flag(None, "GPT-2's vocab.json", metavar="PATH")
    merge_file: str | None = flag(None, "GPT-2's merges.txt", metavar="PATH")
    tiktoken_pattern: str = flag("v2", "how TikTokenizer splits text before the merges", choices=TIKTOKEN_PATTERNS)
    vocab_size: int | None = flag(None, "number of token ids; NullTokenizer needs it")
    eod_token: str | None = flag(None, "token that ends a document; the tokenizer's own end of text without it")

    def build(self) -> Tokenizer | None:
        """The tokenizer that the flags name, None if they name none.

        Raises:
            DataError: a flag that the type needs is missing or not its own, or the vocabulary is too large.
        """
        kind = self.tokenizer_type
        if kind is None and self.tokenizer_model is None and self.vocab_file is None:
            return None
        kind = kind or ("HuggingFaceTokenizer" if self.tokenizer_model else "GPT2BPETokenizer")
        builders: dict[str, Callable[[], Tokenizer]] = {
            "HuggingFaceTokenizer": lambda: HuggingFaceTokenizer(self._model(kind, "a tokenizer.json"), self.eod_token),
            "GPT2BPETokenizer": self._gpt2,
            "GPTSentencePieceTokenizer": lambda: SentencePieceTokenizer(
                self._model(kind, "a SentencePiece .model"), self.eod_token
            ),
            "TikTokenizer": lambda: TikTokenizer(
                self._model(kind, "a tiktoken vocabulary"), self.tiktoken_pattern, self.vocab_size
            ),
            "ByteTokenizer": ByteTokenizer,
            "NullTokenizer": self._null,
        }
        if kind not in builders:
            raise DataError(f"unknown tokenizer type {kind}", f"known are {', '.join(builders)}", "use one of them")
        tokenizer = builders[kind]()
        if kind != "NullTokenizer" and self.vocab_size is not None and tokenizer.vocab_size > self.vocab_size:
            rule = f"{kind} has ids up to {tokenizer.vocab_size - 1}"
            fix = f"leave it out, or use {tokenizer.vocab_size} or more"
            raise DataError(f"--vocab-size is {self.vocab_size}", rule, fix)
        return tokenizer

    def _model(self, kind: str, what: str) -> str:
        if self.tokenizer_model is None:
            raise DataError(f"{kind} without --tokenizer-model", f"it needs {what}", "name it")
        return self.tokenizer_model

    def _gpt2(self) -> Tokenizer:
        if self.vocab_file is None or self.merge_file is None:
            raise DataError("GPT2BPETokenizer", "it needs both of its files", "give --vocab-file and --merge-file")
        return GPT2BPETokenizer(self.vocab_file, self.merge_file, self.eod_token)

    def _null(self) -> Tokenizer:
        if self.vocab_size is None:
            raise DataError("NullTokenizer without --vocab-size", "it needs the number of ids", "add --vocab-size N")
        return NullTokenizer(self.vocab_size)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    vocab_size: int | None = None,
    eod_token: str | None = None,
) -> Tokenizer:
    """The tokenizer that --tokenizer-type, --tokenizer-model, --vocab-size and --eod-token name."""
    model = None if tokenizer_model is None else str(tokenizer_model)
    options = TokenizerOptions(
        tokenizer_type=tokenizer_type, tokenizer_model=model, vocab_size=vocab_size, eod_token=eod_token
    )
    tokenizer = options.build()
    assert tokenizer is not None, tokenizer_type
    return tokenizer
