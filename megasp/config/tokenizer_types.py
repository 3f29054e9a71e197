"""Names that --tokenizer-type and --tiktoken-pattern take; the tokenizers are in `megasp.data`."""

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "TikTokenizer",
    "ByteTokenizer",
    "NullTokenizer",
)
TIKTOKEN_PATTERNS = ("v1", "v2", "gpt2", "cl100k")
