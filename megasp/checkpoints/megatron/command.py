"""`megasp convert from-megatron`: a checkpoint of Megatron-LM's as ours, with the optimizer, to go on with its run.

Nothing that is in the checkpoint is run: what its pickles name is looked up in a table, and refused where it is not in
it. The model's flags are for checkpoints that do not keep their settings; given, they win.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from megasp import log
from megasp.checkpoints.megatron.conversion import from_megatron
from megasp.config.flags import REQUIRED, Parser, add_flags, build, flag
from megasp.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion."""

    input: str = flag(
        REQUIRED, "Megatron-LM's --save directory (its latest checkpoint is taken), or one iter_N in it", metavar="DIR"
    )
    save: str = flag(REQUIRED, "directory of checkpoints to write; it must be new or empty", metavar="DIR")
    no_load_optim: bool = flag(False, "take the weights alone, without the optimizer's state")
    consumed_train_samples: int | None = flag(None, "samples that the run has read, where the checkpoint does not say")
    apply_layernorm_1p: bool = flag(
        False, "norm weights are stored around zero (Megatron-LM's flag), where the checkpoint does not say"
    )
    seq_length: int | None = flag(None, "tokens of a sample, where the checkpoint does not say")
    seed: int | None = flag(None, "seed of the run, where the checkpoint does not say; 1234 without it")


def main(argv: Sequence[str], prog: str) -> int:
    """Convert, and say how the run goes on."""
    parser = Parser(
        prog=prog, description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Options)
    add_flags(parser, ModelConfig)
    given = vars(parser.parse_args(argv))
    options = build(Options, given)
    own = ("input", "save", "no_load_optim", "consumed_train_samples", "apply_layernorm_1p")
    done = from_megatron(
        options.input,
        options.save,
        optimizer=not options.no_load_optim,
        given={name: value for name, value in given.items() if name not in own},
        samples=options.consumed_train_samples,
        centered=options.apply_layernorm_1p,
    )
    for path in sorted(done.directory.iterdir()):
        log.info(f"wrote {path} ({path.stat().st_size:,} bytes)")
    for note in done.notes:
        log.warning(note)
    log.info("next:")
    log.info(f"  megasp checkpoint inspect {options.save}")
    if done.step == 0:
        log.info(
            f"  torchrun ... pretrain_gpt.py --config {options.save}/config.yaml --load {options.save} --finetune ..."
        )
        return 0
    fresh = " --no-load-optim" if options.no_load_optim else ""
    log.info(
        f"  torchrun ... pretrain_gpt.py --config {options.save}/config.yaml --load {options.save} "
        f"--save {options.save}{fresh} ...    goes on after step {done.step}, in any layout"
    )
    return 0
