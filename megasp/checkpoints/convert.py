"""`megasp convert to-hf`: a checkpoint as a Hugging Face model."""

from dataclasses import dataclass

from megasp import log
from megasp.checkpoints.hugging_face import DTYPES, to_hf
from megasp.config.flags import REQUIRED, flag
from megasp.config.hf_families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion."""

    load: str = flag(REQUIRED, "directory of checkpoints (the latest is taken), or one step_N in it", metavar="DIR")
    output: str = flag(REQUIRED, "directory to write; it must be new or empty", metavar="DIR")
    dtype: str | None = flag(None, "dtype of the weights; the run's compute dtype without it", choices=tuple(DTYPES))
    model_type: str | None = flag(
        None,
        "family to write, where several can say the model; the one that it came from, or the first, without it",
        choices=tuple(family.model_type for family in FAMILIES),
    )
    tokenizer_model: str | None = flag(
        None, "tokenizer.json to carry along, or its directory; the run's own without it", metavar="PATH"
    )


def run(options: Options) -> int:
    """Convert, and say what was written and how it is loaded."""
    output = to_hf(options.load, options.output, options.dtype, options.tokenizer_model, model_type=options.model_type)
    for path in sorted(output.iterdir()):
        log.info(f"wrote {path} ({path.stat().st_size:,} bytes)")
    log.info("load it with transformers:")
    log.info("    from transformers import AutoModelForCausalLM")
    log.info(f"    model = AutoModelForCausalLM.from_pretrained({str(output)!r})")
    return 0
