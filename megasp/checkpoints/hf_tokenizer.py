"""The tokenizer beside a Hugging Face model: carried along from where the run had it."""

import json
import shutil
from pathlib import Path
from typing import Any

from megasp import log
from megasp.config.schema import DataConfig
from megasp.data import HuggingFaceTokenizer, Tokenizer, TokenizerOptions

TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
GENERATION = "generation_config.json"
FILES = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
    SENTENCEPIECE, GENERATION,
)  # fmt: skip
"""What may stand beside tokenizer.json and tokenizer_config.json."""
OWN_CONFIG = "tokenizer_config.json"


def carry(source: Path, folder: Path, home: Path) -> dict[str, str]:
    """Copy the tokenizer's files and the generation config of a Hugging Face model, as they are.

    Args:
        home: where `folder` will stand.
    Returns:
        Fields of `DataConfig` that name the tokenizer; none where there is no tokenizer among the files.
    """
    names = [name for name in (TOKENIZER, OWN_CONFIG, *FILES) if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    if TOKENIZER in names:
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(home)}
    if SENTENCEPIECE in names:
        return {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": str(home / SENTENCEPIECE)}
    return {}


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
    path = Path(model or data.tokenizer_model or data.vocab_file or "")
    home = path if path.is_dir() else path.parent
    if kind == "HuggingFaceTokenizer":
        _copy_beside(home, folder)
        shutil.copyfile(home / TOKENIZER if path.is_dir() else path, folder / TOKENIZER)
        _write_config(folder, home, _fast_config(tokenizer, length))
    elif isinstance(tokenizer, HuggingFaceTokenizer):  # of another vocabulary, such as GPT-2's
        tokenizer.save(folder / TOKENIZER)
        _write_config(folder, folder, _fast_config(tokenizer, length))
    elif kind == "GPTSentencePieceTokenizer":
        if (home / OWN_CONFIG).is_file():  # it came from a model of Hugging Face's
            _copy_beside(home, folder)
        shutil.copyfile(path, folder / SENTENCEPIECE)
        if _normalizes(tokenizer):
            log.warning(
                f"{path} normalizes text before it encodes it, and transformers' LlamaTokenizer does not: ids of "
                "repeated spaces or of compatibility characters will differ there"
            )
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
        _write_config(folder, home, config | {"model_max_length": length})
    else:
        log.info(f"no tokenizer is written: transformers reads none of the kind {kind}")
    return tokenizer.eod


def _normalizes(tokenizer: Tokenizer) -> bool:
    """Whether it takes repeated spaces, or a full-width letter, for the plain ones."""
    spaces, space, wide, plain = (ids.tolist() for ids in tokenizer.encode_batch(["a  b", "a b", "\uff21", "A"]))
    return spaces == space or wide == plain


def _copy_beside(home: Path, folder: Path) -> None:
    for name in FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)


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


def _fast_config(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    token = tokenizer.token(tokenizer.eod)
    return {
        "eos_token": token,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,  # decoding gives back the text as it was
    }


def _write_config(folder: Path, home: Path, config: dict[str, Any]) -> None:
    """tokenizer_config.json: the tokenizer's own, if it has one; it says which token ends a document in any case."""
    if (home / OWN_CONFIG).is_file():
        own = json.loads((home / OWN_CONFIG).read_text("utf-8"))
        config = {key: config[key] for key in ("eos_token",) if key in config} | own
    (folder / OWN_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
