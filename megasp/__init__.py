"""megasp: pretraining of GPT-style language models on many GPUs, at long sequence lengths."""

__version__ = "0.1.0.dev0"
