"""A run's configuration: who wins over whom, and that what is written is read back the same."""

import argparse
import dataclasses
import json
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megasp.config.flags import option_string
from megasp.config.layout import Layout
from megasp.config.load import GROUPS, from_dict, from_values, load, parser, to_yaml
from megasp.config.presets import PRESETS
from megasp.config.schema import Config
from megasp.errors import ConfigError
from megasp.verify import DEFAULTS
from megasp.verify import Options as VerifyOptions

GOLDEN = Path(__file__).parents[2] / "golden" / "flags.txt"
FIELDS = [(group, field) for group in GROUPS.values() for field in dataclasses.fields(group)]


@pytest.fixture
def no_model_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """--load-hf names a directory, of which there is none here."""
    monkeypatch.setattr("megasp.config.load.read_directory", lambda *_: {})


def read(*argv: str) -> Config:
    return load(argv, parser("megasp pretrain", ""))[0]


def other_value(group: type, field: dataclasses.Field[Any]) -> Any:
    """A value of the field's type that is not its default."""
    hint = typing.get_type_hints(group)[field.name]
    if hint is bool:
        return not field.default
    if field.metadata["choices"]:
        choices = field.metadata["choices"]
        chosen = next(c for c in choices[::-1] if c != field.default or len(choices) == 1)
        return (chosen,) if typing.get_origin(hint) is tuple else chosen
    if typing.get_origin(hint) is tuple:
        return (3, 5, 7) if typing.get_args(hint)[0] is int else ("a", "b c")
    inner = next((part for part in typing.get_args(hint) if part is not type(None)), hint)
    return {int: 7, float: 0.1875, str: "a word: #1"}[inner]


def everything_changed() -> Config:
    return from_values({field.name: other_value(group, field) for group, field in FIELDS})


def test_no_two_fields_share_a_name() -> None:
    """`from_values` and `from_dict` go by the field's name alone."""
    repeated = [name for name, n in Counter(field.name for _, field in FIELDS).items() if n > 1]
    assert not repeated
    assert all("help" in field.metadata for _, field in FIELDS), "a field without a flag cannot be set by a user"


@pytest.mark.usefixtures("no_model_to_read")
@pytest.mark.parametrize(("group", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_each_flag_sets_its_field_alone(group: type, field: dataclasses.Field[Any]) -> None:
    value = other_value(group, field)
    argv = [option_string(field)]
    if not isinstance(value, bool):
        argv += map(str, value) if isinstance(value, tuple) else [str(value)]
    needed = {
        "num_query_groups": (["--group-query-attention"], {"group_query_attention": True}),
        "sequence_parallel": (["--tensor-model-parallel-size", "2"], {"tensor_model_parallel_size": 2}),
    }
    flags, values = needed.get(field.name, ([], {}))
    assert read(*argv, *flags) == from_values({field.name: value} | values)


def test_megatrons_scripts_split_sequences_over_one_rank() -> None:
    config, _, _, notes = load(["--sequence-parallel"], parser("megasp pretrain", ""))
    assert not config.parallel.sequence_parallel and "--sequence-parallel" in notes[0]


def test_flags_are_frozen() -> None:
    """A flag is a promise: a new one, or one that goes, changes tests/golden/flags.txt on purpose."""
    names = sorted(set(parser("megasp pretrain", "")._option_string_actions) - {"-h", "--help"})
    assert names == GOLDEN.read_text().split(), "update tests/golden/flags.txt if that is meant"


def test_every_flag_has_help() -> None:
    for action in parser("megasp pretrain", "")._actions:
        assert action.help and (action.help != argparse.SUPPRESS), action


def test_precedence(tmp_path: Path) -> None:
    """Default < --model < --config < flag, shown on one number each."""
    file = tmp_path / "c.yaml"
    file.write_text("num-layers: 5\nhidden-size: 320\nlr: 1e-4\n")
    config = read("--model", "gpt2-125m", "--config", str(file), "--hidden-size", "640")
    assert config.training.micro_batch_size == 1, "default"
    assert config.model.num_attention_heads == 12, "preset"
    assert config.model.num_layers == 5 and config.optimizer.lr == 1e-4, "file over preset and default"
    assert config.model.hidden_size == 640, "flag over file"


def test_off_switch_over_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("disable-bias-linear: false\n")
    assert read("--config", str(file)).model.add_bias_linear
    assert not read("--config", str(file), "--disable-bias-linear").model.add_bias_linear
    assert read("--model", "tiny", "--config", str(file)).model.add_bias_linear, "the file wins over the preset"


def test_preset_named_in_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: tiny\nnum-layers: 3\n")
    assert read("--config", str(file)) == from_values(PRESETS["tiny"] | {"num_layers": 3})


def test_model_flag_replaces_the_files_preset(tmp_path: Path) -> None:
    """Not a mixture: GPT-2 has no SwiGLU, whatever the file's preset said."""
    file = tmp_path / "c.yaml"
    file.write_text("model: llama3-8b\nlr: 1e-4\n")
    config = read("--config", str(file), "--model", "gpt2-125m")
    assert config == from_values(PRESETS["gpt2-125m"] | {"lr": 1e-4})


@pytest.mark.parametrize("text", ["model: null", "model: gpt5"])
def test_bad_preset_in_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        read("--config", str(file))


def test_bad_preset() -> None:
    with pytest.raises(ConfigError, match=r"invalid choice: 'llama3' .*llama3-8b"):
        read("--model", "llama3")


def test_commands_own_defaults_and_flags() -> None:
    """`verify`: its defaults give way to a preset and to flags; its own options come beside the configuration."""
    made = parser("megasp verify", "", [VerifyOptions])
    config, source, options, _ = load(["--layout", "tp2", "u2", "--seq-length", "64"], made, VerifyOptions, DEFAULTS)
    assert options.layout == ("tp2", "u2") and source.model is None
    assert config.training.seq_length == 64 and config.model.num_layers == DEFAULTS["num_layers"]
    config = load(["--model", "tiny"], parser("", "", [VerifyOptions]), VerifyOptions, DEFAULTS)[0]
    assert config.model.hidden_size == PRESETS["tiny"]["hidden_size"] and config.optimizer.lr == DEFAULTS["lr"]


def test_megatron_flags_are_translated_and_told() -> None:
    argv = ["--encoder-seq-length", "64", "--use-flash-attn"]
    config, _, _, notes = load(argv, parser("megasp pretrain", ""))
    assert config.training.seq_length == 64 and notes == ["--use-flash-attn: flash attention runs wherever it can"]


# Written and read back


@pytest.mark.parametrize("name", PRESETS)
def test_presets_through_yaml(tmp_path: Path, name: str) -> None:
    config = from_values(PRESETS[name] | {"lr": 3e-4, "train_iters": 10, "data_path": ("corpus",)})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert read("--config", str(tmp_path / "c.yaml")) == config


@pytest.mark.usefixtures("no_model_to_read")
def test_every_field_through_yaml(tmp_path: Path) -> None:
    for config in (everything_changed(), Config()):
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        again = read("--config", str(tmp_path / "c.yaml"))
        assert again == config, [n for n in GROUPS if getattr(again, n) != getattr(config, n)]
    assert everything_changed() != Config()


def test_yaml_wins_over_a_preset_it_was_made_without(tmp_path: Path) -> None:
    """The stored file says every value that has a default; the preset fills in what was not given."""
    config = Config()
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = read("--model", "gpt2-125m", "--config", str(tmp_path / "c.yaml"))
    assert again.model.hidden_size == 0 and again.training.seq_length == 0 and again.model.vocab_size == 50257


def test_groups_need_their_switch(tmp_path: Path) -> None:
    """Megatron-LM ignores `--num-query-groups` alone; preset, file and flags may say the two in different places."""
    with pytest.raises(ConfigError, match=r"--num-query-groups 4 without --group-query-attention: .* add --group"):
        read("--num-query-groups", "4")
    (tmp_path / "c.yaml").write_text("group-query-attention: true\n")
    assert read("--config", str(tmp_path / "c.yaml"), "--num-query-groups", "4").model.kv_heads == 4
    assert read("--model", "llama3-8b", "--num-query-groups", "4").model.kv_heads == 4


@pytest.mark.parametrize("config", [Config(), everything_changed()], ids=["defaults", "changed"])
def test_from_dict(config: Config) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(config)))  # as in a checkpoint's manifest: tuples become lists
    assert from_dict(stored) == config


def test_from_dict_of_another_version() -> None:
    with pytest.raises(ConfigError, match=r"stored configuration has model\.num_experts: this version"):
        from_dict({"model": {"num_layers": 2, "num_experts": 8}})
    with pytest.raises(ConfigError, match=r"stored configuration has experts\.count"):
        from_dict({"experts": {"count": 8}})
    assert from_dict({"model": {"num_layers": 2}}) == from_values({"num_layers": 2}), "missing entries are defaults"


# Values that follow from others


def test_derived_values() -> None:
    def model(**values: Any) -> Any:
        return from_values(values).model

    grouped = {"num_attention_heads": 8, "group_query_attention": True}
    assert model(num_attention_heads=8).kv_heads == 8 and model(**grouped, num_query_groups=2).kv_heads == 2
    assert model(**grouped).kv_heads == 1, "as in Megatron-LM"
    assert model(hidden_size=64, num_attention_heads=8).head_dim == 8
    assert model(hidden_size=64, num_attention_heads=8, kv_channels=16).head_dim == 16
    assert model(hidden_size=768).mlp_size == 3072
    assert model(hidden_size=4096, swiglu=True).mlp_size == 10880, "8/3 x 4096 = 10922, down to a multiple of 64"
    assert model(hidden_size=64, ffn_hidden_size=7, swiglu=True).mlp_size == 7
    assert [model(vocab_size=n).padded_vocab_size for n in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    assert model().qkv_bias and not model(add_bias_linear=False).qkv_bias
    assert model(add_bias_linear=False, add_qkv_bias=True).qkv_bias


def test_batches_and_steps() -> None:
    config = from_values({"micro_batch_size": 2, "train_samples": 1000})
    layout = Layout(dp_inner=4)
    assert (layout.name, config.global_batch_size(layout), config.num_microbatches(layout)) == (
        "tp1-pp1-u1-r1-dp4", 8, 1,
    )  # fmt: skip
    assert config.train_steps(layout) == 125
    config = from_values({"micro_batch_size": 2, "global_batch_size": 48, "train_samples": 1000, "ulysses_size": 2})
    layout = Layout(dp_inner=2, ulysses=2)
    assert (config.num_microbatches(layout), config.train_steps(layout)) == (12, 20), "a partial step is not trained"
