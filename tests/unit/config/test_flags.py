"""Flags made from dataclasses: types, switches, positional and repeated values, and the same names in YAML."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from megasp.config import flags
from megasp.config.flags import REQUIRED, Parser, build, flag, parse, read_yaml
from megasp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a test. This line is not a title."""

    source: str = flag(REQUIRED, "what to read", name="source", metavar="SOURCE")
    output: Path = flag(REQUIRED, "where to write")  # noqa: RUF009
    workers: int = flag(1, "processes, 100% of them")
    share: float | None = flag(None, "a share")
    kind: str = flag("fast", "kind", choices=("fast", "exact"))
    paths: tuple[str, ...] = flag((), "many values")
    bias: bool = flag(True, "biases", off="--disable-bias")
    dry_run: bool = flag(False, "change nothing")
    renamed: int = flag(3, "has another name", name="--other-name")
    hidden: int = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a YAML file may say."""

    num_layers: int = flag(0, "layers")
    rate: float = flag(0.5, "rate")
    name: str | None = flag(None, "name")
    kind: str = flag("fast", "kind", choices=("fast", "exact"))
    paths: tuple[str, ...] = flag((), "paths")
    bias: bool = flag(True, "biases", off="--disable-bias")
    dry_run: bool = flag(False, "change nothing")


def parsed(*argv: str) -> Options:
    return parse(Options, Parser(prog="test"), ["IN", "--output", "out", *argv])


def test_defaults_and_types() -> None:
    assert parsed() == Options(source="IN", output=Path("out"))
    given = parsed("--workers", "4", "--share=0.5", "--kind", "exact", "--dry-run", "--other-name", "9")
    assert given == Options(
        source="IN", output=Path("out"), workers=4, share=0.5, kind="exact", dry_run=True, renamed=9
    )
    assert isinstance(given.output, Path) and isinstance(given.share, float) and given.hidden == 5


def test_off_switch() -> None:
    assert parsed().bias is True and parsed("--disable-bias").bias is False
    with pytest.raises(ConfigError, match="unknown argument --bias"):
        parsed("--bias")


def test_tuples_extend() -> None:
    assert parsed("--paths", "a", "b", "--paths", "c").paths == ("a", "b", "c")
    assert isinstance(parsed("--paths", "a").paths, tuple), "frozen dataclasses hold no lists"


def test_flags_not_given_leave_no_trace() -> None:
    """What tells a flag from a default, so that a file may stand between them."""
    parser = Parser(prog="test")
    flags.add_flags(parser, Options)
    assert vars(parser.parse_args(["IN", "--output", "out"])) == {"source": "IN", "output": Path("out")}


def test_help_says_defaults_and_title(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for words in ("Options of a test. This line is not a title", "100% of them (default: 1)", "switch off: biases"):
        assert words in text, text
    assert "(default: None)" not in text and "(default: ())" not in text and "--hidden" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--workers many", "invalid int value: 'many'"),
        ("--workers 1.5", "invalid int value: '1.5'"),
        ("--share half", "invalid float value: 'half'"),
        ("--kind slow", "invalid choice: 'slow'"),
        ("--workers", "expected one argument"),
        ("--paths", "expected at least one argument"),
        ("--dry-run=yes", "ignored explicit argument 'yes'"),
        ("--wrokers 2", "unknown argument --wrokers: every flag must be one that --help lists; did you mean --workers"),
        ("--wrokers=2", "unknown argument --wrokers: .* did you mean --workers"),
        ("--work 2", "unknown argument --work:"),  # no abbreviations: another version could give them another meaning
        ("--zzzzzzzzz", "unknown argument --zzzzzzzzz: .* see --help"),
        ("surplus", "unknown argument surplus"),
    ],
)
def test_bad_flags(argv: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(*argv.split())


@pytest.mark.parametrize(("argv", "missing"), [(["IN"], "--output"), (["--output", "x"], "SOURCE")])
def test_missing_required(argv: list[str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"arguments are required: {missing}") as caught:
        parse(Options, Parser(prog="megasp test"), argv)
    assert "`megasp test --help`" in str(caught.value)


def test_refused_flags_give_their_reason() -> None:
    parser = Parser(prog="test", refused={"--fp16": "it needs a loss scale"})
    with pytest.raises(ConfigError, match="--fp16 is not supported: it needs a loss scale; leave --fp16 out"):
        parser.parse_args(["--fp16=1"])


def test_build_takes_what_is_its_own() -> None:
    assert build(Settings, {"num_layers": 2, "paths": ["a"], "of_another": 1}) == Settings(num_layers=2, paths=("a",))


# YAML


def from_yaml(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_yaml(path, [Settings], {"--fp16": "it needs a loss scale"})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("num-layers: 3", {"num_layers": 3}),
        ("num_layers: 3", {"num_layers": 3}),
        ("num_layers: '3'", {"num_layers": 3}),
        ("rate: 1e-4", {"rate": 1e-4}),  # YAML 1.1 reads that as a string
        ("rate: 2", {"rate": 2.0}),
        ("rate: -1", {"rate": -1.0}),
        ("name: 2024-01-01", {"name": "2024-01-01"}),
        ("name: 12", {"name": "12"}),
        ("name: null", {"name": None}),
        ("paths: [a, b c]", {"paths": ["a", "b c"]}),
        ("paths: a", {"paths": ["a"]}),
        ("dry-run: true", {"dry_run": True}),
        ("dry-run: false", {"dry_run": False}),
        ("disable-bias: true", {"bias": False}),
        ("disable_bias: false", {"bias": True}),
        ("bias: false", {"bias": False}),
        ("bias: true", {"bias": True}),
    ],
)
def test_yaml(tmp_path: Path, text: str, values: dict[str, object]) -> None:
    assert from_yaml(tmp_path, text) == values
    for key, value in values.items():
        assert type(from_yaml(tmp_path, text)[key]) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num-layers: two", "invalid int value: 'two'"),
        ("num-layers: true", "invalid int value: 'True'"),
        ("num-layers: 2.5", "invalid int value: '2.5'"),
        ("kind: slow", "invalid choice: 'slow'"),
        ("dry-run: 1", "dry-run: 1 in .*config.yaml: a switch is true or false; write `dry-run: true`"),
        ("num-layres: 2", "unknown argument --num-layres: .* did you mean --num-layers"),
        ("num_layres: 2", "did you mean --num-layers"),
        ("fp16: true", "--fp16 is not supported: it needs a loss scale"),
        ("- num-layers", "it must hold `flag-name: value` lines"),
        ("", "it must hold `flag-name: value` lines"),
        ("a: b: c", "it must be valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        from_yaml(tmp_path, text)
    assert "config.yaml" in str(caught.value) or "unknown" in said or "not supported" in said or "mean" in said
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["num-layers: [2, 4]", "num-layers: null", "num-layers: {a: 2}", "kind: null", "paths: {a: b}"],
)
def test_yaml_values_of_another_shape(tmp_path: Path, text: str) -> None:
    """A list for one number must not lose its tail, nor `null` reach a field that cannot be None."""
    with pytest.raises(ConfigError):
        values = from_yaml(tmp_path, text)
        pytest.fail(f"{text!r} was read as {values}")


def test_yaml_error_names_no_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, "num-layers: two")
    assert "--help`" not in str(caught.value), f"a file has no --help: {caught.value}"


def test_yaml_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*absent.yaml: it must be a readable file \(No such file"):
        read_yaml(tmp_path / "absent.yaml", [Settings])
    with pytest.raises(ConfigError, match="it must be a readable file"):
        read_yaml(tmp_path, [Settings])


def test_yaml_file_of_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config .*config.yaml"):
        read_yaml(tmp_path / "config.yaml", [Settings])


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="valid YAML"):
        from_yaml(tmp_path, "name: !!python/object/apply:os.getcwd []")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed().workers = 2  # type: ignore[misc]
