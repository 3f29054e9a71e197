"""`megasp COMMAND`: help of every command, what is imported for it, and one sentence for a user's mistake."""

import errno
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megasp
from megasp import cli, log
from megasp.config.load import load, parser
from megasp.errors import CheckpointError, ConfigError, DataError, UserError

WITHOUT_TORCH = [name for name in cli.COMMANDS if name.startswith(("data ", "train-", "preprocess"))]

SETUP = log.setup


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "setup", lambda: None)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith(f"usage: megasp {command} ")
    assert len(text.splitlines()) > 5 and "None" not in text


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and words in text for name, (_, words) in cli.COMMANDS.items())
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"megasp {megasp.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("fly", "megasp: unknown command fly: the commands are train-tokenizer, "),
        ("data", "megasp: megasp data: .*; write megasp data inspect or megasp data verify"),
        ("data fly", "megasp: megasp data.*: .*; write megasp data inspect"),
        ("convert", "write megasp convert from-hf or megasp convert from-megatron or megasp convert to-hf"),
        ("doctor --fast", "megasp: unknown argument --fast"),
        ("pretrain --num-layres 2", "megasp: unknown argument --num-layres: .*did you mean --num-layers"),
        ("pretrain --fp4-format e2m1", "megasp: --fp4-format is not supported: .* fp4 is not built yet"),
        ("pretrain", "megasp: "),
        ("generate", "megasp: the following arguments are required: --load"),
        ("data inspect", "megasp: the following arguments are required"),
        ("data inspect absent/prefix", "megasp: .*absent/prefix"),
        ("verify", "megasp: no --layout: there must be one to compare with"),
        ("verify --layout tp3", "megasp: .*tensor-model-parallel-size 3.* use a size of"),
        ("verify --layout q2", "megasp: layout name 'q2'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv.split()) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith("megasp: ") and re.search(said, err), err
    assert "Traceback" not in out + err


class Broken:
    """A command's module that fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def main(self, argv: Any, prog: str) -> int:
        raise self.error


def outcome(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Broken(error))
    return cli.main(["doctor"])


def test_os_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(PermissionError(errno.EACCES, "Permission denied", "/data/x"), monkeypatch) == 2
    assert capsys.readouterr().err == "megasp: /data/x: Permission denied; check the path, its rights and the disk.\n"
    assert outcome(OSError(errno.ENOSPC, "No space left on device"), monkeypatch) == 2
    assert capsys.readouterr().err.startswith("megasp: a file: No space left on device; ")


def test_broken_pipe_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`megasp data inspect X | head -1` is nobody's mistake."""
    outcome(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch)
    assert capsys.readouterr().err == ""


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "megasp: interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError("without a number"), AssertionError()])
def test_our_own_mistakes_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        outcome(error, monkeypatch)


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_user_errors(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(kind("x is 3", "it must be even", "use 2 or 4"), monkeypatch) == 2
    assert capsys.readouterr().err == "megasp: x is 3: it must be even; use 2 or 4.\n"


def test_error_sentences_travel() -> None:
    """Ranks send them to the launcher; a question or a full stop ends a sentence once."""
    error = pickle.loads(pickle.dumps(DataError("a", "b", "did you mean c?")))
    assert type(error) is DataError and str(error) == "a: b; did you mean c?"
    assert (error.got, error.rule, error.fix) == ("a", "b", "did you mean c?")
    assert str(ConfigError("a", "b", "use c.")) == "a: b; use c."


def test_modules_have_what_the_table_needs() -> None:
    for name, (module, words) in cli.COMMANDS.items():
        loaded = cli.importlib.import_module(module)
        assert hasattr(loaded, "main") or (hasattr(loaded, "Options") and hasattr(loaded, "run")), name
        assert (loaded.__doc__ or "").strip() and words[0].islower() and not words.endswith(".")


def test_data_commands_never_load_torch() -> None:
    """In a fresh interpreter: the help of each, and the list of commands; torch would take seconds."""
    lines = [
        "import sys, contextlib, io",
        "from megasp import cli",
        "def helps(*argv):",
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):",
        "        cli.main([*argv, '--help'])",
        f"for name in {['', *WITHOUT_TORCH]!r}:",
        "    helps(*name.split())",
        "    heavy = [m for m in ('torch', 'transformers', 'tensorboard') if m in sys.modules]",
        "    assert not heavy, (name, heavy)",
    ]
    assert len(WITHOUT_TORCH) >= 5
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_ranks_speak_once_of_one_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all ranks read is told by rank 0; what one rank met is told by that rank."""
    monkeypatch.setenv("RANK", "1")
    assert outcome(ConfigError("a", "b", "c"), monkeypatch) == 2
    assert capsys.readouterr().err == ""
    assert outcome(DataError("a", "b", "c"), monkeypatch) == 2
    assert capsys.readouterr().err == "megasp: a: b; c.\n"


def test_printed_config_is_yaml_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--print-config > run.yaml` must hold no other line, whatever Megatron-LM flags a script has."""
    monkeypatch.setattr(log._LOGGER, "handlers", [])
    monkeypatch.setattr(log._LOGGER, "propagate", True)
    monkeypatch.setattr(log, "setup", SETUP)
    assert cli.main(["pretrain", "--use-flash-attn", "--model", "tiny", "--num-layers", "2", "--print-config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = load(["--config", str(tmp_path / "run.yaml")], parser("", ""))[0]
    assert config == load(["--model", "tiny", "--num-layers", "2"], parser("", ""))[0]


def test_print_config_of_a_cluster_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "pretrain --model llama3-70b --tensor-model-parallel-size 8 --bf16 --distributed-backend nccl --print-config"
    assert cli.main(argv.split()) == 0
    text = capsys.readouterr().out
    assert "tensor-model-parallel-size: 8" in text and "hidden-size: 8192" in text
