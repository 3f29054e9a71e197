"""Megatron-LM's flags: every one is in exactly one place, and each place does what it says."""

import dataclasses

import pytest

from megasp.config import megatron_flags, megatron_refused
from megasp.config.flags import option_string
from megasp.config.megatron_flags import ALIASES, ALWAYS_ON, ONLY, REFUSED, translate
from megasp.config.schema import Config
from megasp.errors import ConfigError

OURS = {
    option_string(field)
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(group.default_factory)  # type: ignore[arg-type]
    if "help" in field.metadata
}


def test_each_flag_has_one_answer() -> None:
    tables = [OURS, set(ALIASES), set(ALWAYS_ON), set(REFUSED)]
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_no_flag_is_listed_twice() -> None:
    refused = [flag for _, flags in megatron_refused._BY_REASON for flag in flags.split()]
    accepted = [flag for _, _, flags in megatron_flags._ACCEPTED for flag in flags.split()]
    assert (len(refused), len(accepted)) == (len(REFUSED), len(ALWAYS_ON))
    assert all(flag.startswith("--") for flag in refused + accepted)


def test_reasons_are_sentences() -> None:
    for reason in [*REFUSED.values(), *(says for _, says in ALWAYS_ON.values())]:
        assert len(reason.split()) >= 4 and reason.strip() == reason and not reason.endswith("."), reason


def test_aliases_and_advice_name_flags_that_exist() -> None:
    assert {flag for flags in ALIASES.values() for flag in flags if flag.startswith("--")} <= OURS
    known = OURS | {"--config", "--print-config"}
    for reason in [*REFUSED.values(), *(says for _, says in ALWAYS_ON.values())]:
        named = {word.strip("(),:.`") for word in reason.split() if word.strip("(").startswith("--")}
        assert named <= known, reason


def test_arities() -> None:
    assert {values for values, _ in ALWAYS_ON.values()} == {0, 1}
    assert all(ALWAYS_ON[flag][0] == 1 for flag in ONLY)
    assert ALWAYS_ON["--transformer-impl"][0] == 1 and ALWAYS_ON["--use-flash-attn"][0] == 0


def test_translate() -> None:
    given = (
        "--num-layers 2 --use-flash-attn --transformer-impl local --no-rope-fusion --no-masked-softmax-fusion --bf16"
    )
    ours, notes = translate(given.split())
    assert ours == ["--num-layers", "2", "--bf16"]
    assert notes[0] == "--use-flash-attn: flash attention runs wherever it can"
    assert notes[2].startswith("--no-rope-fusion: it computes the same function; --compile ")
    assert notes[3].startswith("--no-masked-softmax-fusion: kernels ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--use-rotary-position-embeddings", "--position-embedding-type rope"),
        ("--encoder-seq-length 128 --bf16", "--seq-length 128 --bf16"),
        ("--encoder-seq-length=128", "--seq-length 128"),
        ("--transformer-impl=local --lr=1", "--lr=1"),
        ("--use-torch-fsdp2", "--data-parallel-sharding-strategy optim_grads_params"),
        ("--use-distributed-optimizer --overlap-param-gather", "--use-distributed-optimizer"),
        ("--bf16 --fp8-hybrid --fp8-recipe tensorwise", "--bf16 --fp8-format hybrid --fp8-recipe tensorwise"),
        ("--recompute-activations --bf16", "--recompute-granularity selective --bf16"),
    ],
)
def test_translated(given: str, expected: str) -> None:
    assert translate(given.split())[0] == expected.split()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--bf16 --init-model-with-meta-device", "--init-model-with-meta-device is not supported: weights are"),
        ("--fp8-param-gather", "--fp8-param-gather is not supported: with --fp8-format weights are kept"),
        ("--dataloader-type cyclic", "--dataloader-type is cyclic"),
        ("--data-cache-path --bf16", "--data-cache-path: it takes a value"),
        ("--use-flash-attn=true", "--use-flash-attn true: it is a switch"),
    ],
)
def test_refusals(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match="^" + said):
        translate(given.split())
