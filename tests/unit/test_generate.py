"""Sampling: which tokens may come, how often, and when it ends."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from megasp import generate
from megasp.data import NullTokenizer
from megasp.errors import ConfigError
from megasp.generate import Options, choose, sample
from megasp.parallel_state import ParallelState

PROBABILITIES = torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15])
LOGITS = PROBABILITIES.log() + 3


def options(**values: Any) -> Options:
    return Options(load="", **({"temperature": 1.0, "top_p": 1.0} | values))


def drawn(n: int, **values: Any) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose(LOGITS.clone(), options(**values), generator) for _ in range(n))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(20, temperature=0.0) == {1: 20}
    assert drawn(20, temperature=0.0, top_k=1, top_p=0.1) == {1: 20}


def test_frequencies() -> None:
    counts = drawn(4000)
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03), token


def test_temperature_sharpens() -> None:
    expected = (PROBABILITIES.log() / 0.5).softmax(0)
    counts = drawn(4000, temperature=0.5)
    assert counts[1] / 4000 == pytest.approx(expected[1].item(), abs=0.03) and expected[1] > 0.7


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.8, "top_k": 2}, {1, 3}),
    ],
)
def test_cuts(values: dict[str, Any], allowed: set[int]) -> None:
    """The smallest set of likeliest tokens that reaches top-p, and no more than k; every one of them may come."""
    assert set(drawn(600, **values)) == allowed


def test_kept_tokens_keep_their_ratio() -> None:
    counts = drawn(3000, top_k=2)
    assert counts[1] / counts[3] == pytest.approx(2.5, rel=0.15)


class Scripted:
    """A "model" whose next token is a function of what it sees."""

    def __init__(self, next_token: Any, vocabulary: int = 8) -> None:
        self.next_token, self.vocabulary = next_token, vocabulary
        self.state = ParallelState.single()
        self.windows: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.windows.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], self.vocabulary)
        logits[0, -1, self.next_token(self.windows[-1])] = 50.0
        return logits


TOKENIZER = NullTokenizer(6)
GREEDY = {"temperature": 0.0}


def sampled(model: Scripted, start: list[int], context: int = 100, **values: Any) -> list[int]:
    return list(sample(model, start, options(**GREEDY | values), context, TOKENIZER))  # type: ignore[arg-type]


def test_ends_at_end_of_document() -> None:
    model = Scripted(lambda seen: TOKENIZER.eod if seen[-1] == 3 else seen[-1] + 1)
    assert sampled(model, [0]) == [1, 2, 3], "the end itself is not part of the text"
    assert model.windows[-1] == [0, 1, 2, 3]


def test_ends_at_the_limit() -> None:
    assert sampled(Scripted(lambda seen: 2), [0], max_new_tokens=5) == [2] * 5


def test_sees_no_more_than_its_context() -> None:
    model = Scripted(lambda seen: (seen[-1] + 1) % 5)
    sampled(model, [0, 1, 2, 3], context=3, max_new_tokens=3)
    assert model.windows == [[1, 2, 3], [2, 3, 4], [3, 4, 0]]


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    """Its logits are whatever the initial weights say."""
    assert TOKENIZER.vocab_size < 8
    assert sampled(Scripted(lambda seen: 7), [0], max_new_tokens=3) == [0, 0, 0]
    free = sampled(Scripted(lambda seen: 7), [0], max_new_tokens=60, temperature=1.0)
    assert max(free) < TOKENIZER.vocab_size


def test_seed_repeats() -> None:
    def text(seed: int) -> list[int]:
        return sampled(Scripted(lambda seen: 7), [0], max_new_tokens=30, temperature=1.0, seed=seed)

    assert text(1) == text(1) and text(1) != text(2)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_refused_before_anything_is_read(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"temperature and top-k are at least 0, top-p lies in \(0, 1\]") as caught:
        generate.run(dataclasses.replace(options(), load="/absent", **values))
    assert str(next(iter(values.values()))) in caught.value.got


def test_no_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=f"--load {tmp_path}: there is no checkpoint in it"):
        generate.run(dataclasses.replace(options(), load=str(tmp_path)))
