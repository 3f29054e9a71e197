"""The tokenizer beside a Hugging Face model: carried along from where the run had it."""

import json
import shutil
from pathlib import Path
from typing import Any

from megasp import log
from megasp.config.schema import DataConfig
from megasp.data import HuggingFaceTokenizer, Tokenizer, TokenizerOptions

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
FILES = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", GENERATION,
)  # fmt: skip
"""What may stand beside tokenizer.json and tokenizer_config.json."""
OWN_CONFIG = "tokenizer_config.json"


def carry(source: Path, folder: Path) -> bool:
    """Copy the tokenizer's files and the generation config of a Hugging Face model, as they are. Returns whether there
    is a tokenizer among them."""
    names = [name for name in (TOKENIZER, OWN_CONFIG, *FILES) if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return TOKENIZER in names


def write_tokenizer(
    folder: Path, data: DataConfig, vocab_size: int | None, model: str | None, length: int
) -> int | None:
    """Write the run's tokenizer for transformers. Returns the id that ends a document, None where nobody says.

    megasp starts no document with a token of its own, so the end of the one before serves as bos, as in GPT-2.

    Args:
        model: tokenizer.json or its directory, instead of the run's own.
        length: tokens that the model is made for.
    """
    kind = "HuggingFaceTokenizer" if model else data.tokenizer_type
    if kind is None and data.tokenizer_model:
        kind = "HuggingFaceTokenizer"
    if kind is None:
        return None
    tokenizer = _build(kind, model, data, vocab_size)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        path = Path(model or data.tokenizer_model or data.vocab_file or "")
        home = path if path.is_dir() else path.parent
        tokenizer.save(folder / TOKENIZER)
        if kind == "HuggingFaceTokenizer":
            for name in FILES:
                if (home / name).is_file():
                    shutil.copyfile(home / name, folder / name)
            shutil.copyfile(home / TOKENIZER if path.is_dir() else path, folder / TOKENIZER)
        _write_config(folder, home if kind == "HuggingFaceTokenizer" else folder, tokenizer, length)
    elif kind == "GPTSentencePieceTokenizer":
        shutil.copyfile(data.tokenizer_model or "", folder / "tokenizer.model")
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "legacy": False,
            "model_max_length": length,
        }
        (folder / OWN_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    else:
        log.info(f"no tokenizer is written: transformers reads none of the kind {kind}")
    return tokenizer.eod


def _build(kind: str, model: str | None, data: DataConfig, vocab_size: int | None) -> Tokenizer:
    if kind == "NullTokenizer":  # a run leaves its number of ids there
        vocab_size = int(data.tokenizer_model) if data.tokenizer_model else vocab_size
    tokenizer = TokenizerOptions(
        tokenizer_type=kind,
        tokenizer_model=model or data.tokenizer_model,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        tiktoken_pattern=data.tiktoken_pattern,
        vocab_size=vocab_size if kind in ("NullTokenizer", "TikTokenizer") else None,
    ).build()
    assert tokenizer is not None, kind
    return tokenizer


def _write_config(folder: Path, home: Path, tokenizer: HuggingFaceTokenizer, length: int) -> None:
    """tokenizer_config.json: the tokenizer's own, if it has one."""
    token = tokenizer.token(tokenizer.eod)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,  # decoding gives back the text as it was
    }
    if (home / OWN_CONFIG).is_file():
        config = json.loads((home / OWN_CONFIG).read_text("utf-8"))
    (folder / OWN_CONFIG).write_text(json.dumps({"eos_token": token} | config, indent=2) + "\n")
