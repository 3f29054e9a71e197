"""`megasp generate`: sample text from a checkpoint of any layout, in one process.

Every token is sampled from the model's distribution over what stands before it, sharpened by the temperature and cut to
the likeliest tokens (top-k, top-p: arXiv 1904.09751). With a seed it is reproducible.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megasp import checkpoints, log
from megasp.checkpoints import Shard
from megasp.config.flags import REQUIRED, flag
from megasp.config.load import from_dict
from megasp.config.schema import Config
from megasp.data import Tokenizer
from megasp.errors import ConfigError
from megasp.model import Factory, GPTModel
from megasp.parallel_state import ParallelState
from megasp.training.datasets import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generation."""

    load: str = flag(REQUIRED, "directory of checkpoints (the latest is taken), or one step_N in it", metavar="DIR")
    prompt: str = flag("", "text to go on from; nothing begins a document")
    max_new_tokens: int = flag(128, "tokens to sample at most; the end-of-document token ends it sooner")
    temperature: float = flag(0.8, "divides the logits; 0 always takes the likeliest token")
    top_k: int = flag(0, "sample among the k likeliest tokens; 0 is no limit")
    top_p: float = flag(0.95, "sample among the likeliest tokens that together have this probability")
    seed: int = flag(1234, "seed of the sampling")


def run(options: Options) -> int:
    """Load, sample, print."""
    if not 0 < options.top_p <= 1 or options.temperature < 0 or options.top_k < 0 or options.max_new_tokens < 1:
        raise ConfigError(
            f"temperature {options.temperature}, top-p {options.top_p}, top-k {options.top_k}, "
            f"max-new-tokens {options.max_new_tokens}",
            "temperature and top-k are at least 0, top-p lies in (0, 1], there is a token to sample",
            "use --temperature 0.8 --top-p 0.95",
        )
    model, config, step = load_model(options.load)
    tokenizer = tokenizer_of(config)
    if tokenizer is None:
        raise ConfigError(
            f"{options.load} was trained without a tokenizer", "text needs one", "train with --tokenizer-type"
        )
    log.info(f"step {step} of {options.load}, {sum(p.numel() for p in model.parameters()):,} parameters")
    start = list(tokenizer.encode_batch([options.prompt])[0]) or [tokenizer.eod]
    tokens = sample(model, start, options, config.training.seq_length, tokenizer)
    print(options.prompt + tokenizer.decode(list(tokens)), flush=True)
    return 0


def load_model(root: str) -> tuple[GPTModel, Config, int]:
    """The model of a checkpoint, whole, in fp32 on this machine's first device; its configuration; its step.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    directory = checkpoints.find_latest(root)
    if directory is None:
        raise ConfigError(f"--load {root}", "there is no checkpoint in it", "name a directory that --save wrote")
    manifest = checkpoints.read_manifest(directory)
    config = from_dict(manifest.metadata["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPTModel(config.model, ParallelState.single(device), factory=Factory(device)).eval()
    checkpoints.load(directory, [Shard("model", p.data, p.pieces) for p in model.parameters()])  # type: ignore[attr-defined]
    return model, config, manifest.step


@torch.no_grad()
def sample(model: GPTModel, start: list[int], options: Options, context: int, tokenizer: Tokenizer) -> Iterator[int]:
    """Token ids after `start`, one by one, until the end-of-document token or `options.max_new_tokens`.

    The model sees the last `context` tokens: no more than it was trained with.
    """
    generator = torch.Generator().manual_seed(options.seed)
    tokens = list(start)
    for _ in range(options.max_new_tokens):
        window = torch.tensor([tokens[-context:]], device=model.state.device)
        token = choose(model(window)[0, -1, : tokenizer.vocab_size].float().cpu(), options, generator)
        if token == tokenizer.eod:
            return
        tokens.append(token)
        yield token


def choose(logits: Tensor, options: Options, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    if options.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / options.temperature, 0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # of the likelier tokens: the first is always kept
    probabilities[before >= options.top_p] = 0
    if options.top_k:
        probabilities[options.top_k :] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
