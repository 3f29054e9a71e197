"""`megasp COMMAND`: the one table of commands, and what happens to errors.

A command's module is imported only when the command runs, so that `megasp --help` and the data tools never load torch.
It has either `Options` (a dataclass whose fields are the flags) and `run(options)`, or `main(argv, prog)` where a
command takes all the flags of a run; both return the exit status.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from megasp import __version__, log
from megasp.config import flags
from megasp.errors import ConfigError, UserError

COMMANDS = {
    "train-tokenizer": ("megasp.data.train_tokenizer", "train a byte-level BPE tokenizer on text"),
    "preprocess": ("megasp.data.preprocess", "turn text into .bin/.idx token files"),
    "data inspect": ("megasp.data.inspect", "what a corpus holds"),
    "data verify": ("megasp.data.verify", "read a whole corpus and check it"),
    "data merge": ("megasp.data.merge", "several corpora as one"),
    "data explain": ("megasp.data.explain", "which documents and tokens a training step reads"),
    "pretrain": ("megasp.training.pretrain", "train a model (under torchrun: pretrain_gpt.py)"),
    "verify": ("megasp.verify", "show that layouts train exactly as one process does"),
    "schedule": ("megasp.pipeline.show", "draw a pipeline schedule, with its bubble, memory and messages"),
    "checkpoint inspect": ("megasp.checkpoints.inspect", "what a checkpoint holds"),
    "checkpoint verify": ("megasp.checkpoints.verify", "read every byte of checkpoints, and name what is damaged"),
    "convert from-hf": ("megasp.checkpoints.convert_from_hf", "a Hugging Face model as a checkpoint"),
    "convert from-megatron": (
        "megasp.checkpoints.megatron.command",
        "a checkpoint of Megatron-LM's as ours, to go on with its run",
    ),
    "memory": ("megasp.memory", "what each rank will hold in memory, by component"),
    "plan": ("megasp.planner.plan", "the parallel layout that trains fastest on given GPUs, before renting them"),
    "calibrate": ("megasp.planner.calibrate", "measure this machine's rates, for megasp plan --gpu FILE"),
    "convert to-hf": ("megasp.checkpoints.convert", "a checkpoint as a Hugging Face model"),
    "generate": ("megasp.generate", "sample text from a checkpoint"),
    "doctor": ("megasp.doctor", "what this machine has, and what is wrong with it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit status 2."""
    log.setup()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except UserError as error:
        # All ranks read the same configuration: one of them says what is wrong with it.
        if log.rank() == 0 or not isinstance(error, ConfigError):
            print(f"megasp: {error}", file=sys.stderr)
    except BrokenPipeError:
        pass
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(
            f"megasp: {error.filename or 'a file'}: {error.strerror}; check the path, its rights and the disk.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("megasp: interrupted", file=sys.stderr)
        return 130
    return 2


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"megasp {__version__}")
        return 0
    for words in (2, 1):
        command = " ".join(argv[:words])
        if command in COMMANDS:
            return _run_command(command, argv[words:])
    parts = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if parts:
        raise ConfigError(f"megasp {argv[0]}", "it is not a whole command", f"write megasp {' or megasp '.join(parts)}")
    raise ConfigError(f"unknown command {argv[0]}", f"the commands are {', '.join(COMMANDS)}", "see megasp --help")


def _run_command(command: str, argv: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[command][0])
    prog = f"megasp {command}"
    if hasattr(module, "main"):
        return int(module.main(argv, prog))
    parser = flags.Parser(
        prog=prog,
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return int(module.run(flags.parse(module.Options, parser, argv)))


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:18} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megasp COMMAND [flags]",
            "",
            "commands:",
            *lines,
            "",
            "`megasp COMMAND --help` lists a command's flags.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
