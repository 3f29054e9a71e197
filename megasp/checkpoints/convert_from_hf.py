"""`megasp convert from-hf`: a Hugging Face model as a checkpoint, to begin a run with in any layout."""

from dataclasses import dataclass

from megasp import log
from megasp.checkpoints.hugging_face import DTYPES, from_hf
from megasp.config.flags import REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion."""

    input: str = flag(REQUIRED, "directory with config.json and safetensors", metavar="DIR")
    save: str = flag(REQUIRED, "directory of checkpoints to write; it must be new or empty", metavar="DIR")
    dtype: str | None = flag(None, "dtype of the weights; that of the files without it", choices=tuple(DTYPES))


def run(options: Options) -> int:
    """Convert, and say how it is used."""
    directory = from_hf(options.input, options.save, options.dtype)
    for path in sorted(directory.iterdir()):
        log.info(f"wrote {path} ({path.stat().st_size:,} bytes)")
    log.info("next:")
    log.info(f"  megasp checkpoint inspect {options.save}")
    log.info(f"  megasp pretrain --load-hf {options.input} ...    trains on from the model itself, nothing converted")
    return 0
