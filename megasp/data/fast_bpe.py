"""Byte-level BPE by `tiktoken`, several times faster than `tokenizers`, where its ids are proven to be the same.

`tokenizers` applies the rules of merging (left, right) in their order; `tiktoken` merges the neighbours whose
concatenation has the lowest rank, whatever they are. Both give the same ids for every text if this holds:

    merging the bytes of each token, of rank k and rule (left, right), by ranks below k alone ends in [left, right]

For consider any moment at which tiktoken merges x, y into such a token t. Nothing was merged across the ends of t
before, and no pair of a lower rank is left, so what lies between them is what ranks below k make of the bytes of t
alone: left and right. So tiktoken applies t's own rule, at t's own turn, always.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = 256


class FastBPE:
    """The encoder of a byte-level `tokenizer.json`; `FastBPE.of(...)` is None for one that it cannot serve.

    fast = FastBPE.of(backend.to_str())
    fast.encode("some text")     # ids, int64, or None for a text that holds a special token
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], ids: np.ndarray, special: Sequence[str]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding("megasp", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = ids
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    @classmethod
    def of(cls, tokenizer_json: str) -> "FastBPE | None":
        """The fast encoder of a tokenizer, if tiktoken is installed and its ids are the same."""
        try:
            import tiktoken  # noqa: F401
        except ImportError:
            return None
        settings = json.loads(tokenizer_json)
        pattern, ranked = _pattern(settings), _ranks(settings["model"])
        if pattern is None or ranked is None:
            return None
        ranks, ids = ranked
        return cls(pattern, ranks, ids, [token["content"] for token in settings["added_tokens"]])

    def encode(self, text: str) -> np.ndarray | None:
        if self._special is not None and self._special.search(text):
            return None
        return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]


def _pattern(settings: Mapping[str, Any]) -> str | None:
    """The regular expression that splits text before the merges, None where anything else happens to the text."""
    if settings["normalizer"] is not None or settings["pre_tokenizer"] is None:
        return None
    first = settings["pre_tokenizer"]
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    plain = len(steps) == 2 and split["type"] == "Split" and "Regex" in split["pattern"]
    isolated = plain and split["behavior"] == "Isolated" and not split["invert"]
    return split["pattern"]["Regex"] if isolated and not steps[1].get("use_regex", True) else None


def _ranks(model: Mapping[str, Any]) -> tuple[dict[bytes, int], np.ndarray] | None:
    """Rank of each token's bytes, and id of each rank; None where the proof fails."""
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in extras):
        return None
    vocab, letters = model["vocab"], byte_letters()
    if not all(letter in vocab for letter in letters):
        return None
    values = {letter: value for value, letter in enumerate(letters)}
    ranks = {bytes([value]): value for value in range(BYTES)}
    ids = [vocab[letter] for letter in letters]
    for rule in model["merges"]:
        left, right = rule if isinstance(rule, list) else rule.split(" ")
        parts = [bytes(values[letter] for letter in side) for side in (left, right)]
        token = parts[0] + parts[1]
        if token in ranks or merge(token, ranks) != parts:
            return None
        ranks[token] = len(ranks)
        ids.append(vocab[left + right])
    return ranks, np.array(ids, np.int64)


def merge(text: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Bytes merged by rank, lowest first, leftmost first among equals, until no pair has a rank."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        pairs = [ranks.get(parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        lowest = min((rank for rank in pairs if rank is not None), default=None)
        if lowest is None:
            return parts
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter by which byte-level vocabularies write each byte: itself if printable, else one from U+0100 on.

    Source: OpenAI's GPT-2, `bytes_to_unicode`.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(value if value in printable else next(others)) for value in range(BYTES))
