"""`megasp checkpoint inspect`: what a checkpoint holds, from its manifest alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from megasp import log
from megasp.checkpoints.manifest import Manifest, read_manifest, resolve
from megasp.checkpoints.safetensors_file import DTYPES
from megasp.config.flags import REQUIRED, flag
from megasp.config.load import GROUPS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checkpoint inspection."""

    path: str = flag(REQUIRED, "directory of checkpoints (the latest is taken), or one step_N in it", name="path")
    tensors: bool = flag(False, "list every tensor with its dtype, shape and number of boxes")


def run(options: Options) -> int:
    """Print step, layout, sizes, model and every setting that is not the default."""
    directory = resolve(options.path)
    manifest = read_manifest(directory)
    log.info(str(directory))
    for line in describe(manifest):
        log.info(f"  {line}")
    for name, tensor in manifest.tensors.items() if options.tensors else ():
        log.info(f"  {name}  {tensor.dtype} {list(tensor.shape)} in {len(tensor.boxes)} boxes")
    return 0


def describe(manifest: Manifest) -> Iterator[str]:
    """A manifest in lines."""
    metadata = manifest.metadata
    progress = metadata.get("progress", {})
    counts = "".join(f", {progress[name]:,} {name}" for name in ("samples", "tokens") if name in progress)
    yield f"step {manifest.step:,}{counts}; saved by layout {manifest.layout}"
    if "source" in metadata:
        yield f"converted from {metadata['source']}"
    versions = metadata.get("versions", {})
    if versions:
        yield "written by " + ", ".join(f"{name} {version}" for name, version in versions.items())
    for phase in metadata.get("data", {}).get("phases", ()):
        parts = ", ".join(part["name"] for part in phase.get("parts", ())) or "synthetic data"
        yield f"data from step {phase['step']:,}, sample {phase['sample']:,}: {parts}, length {phase['seq_length']:,}"
    files = manifest.files.values()
    yield f"{len(files)} files, {sum(file.bytes for file in files):,} bytes"
    for kind in dict.fromkeys(name.split("/")[0] for name in manifest.tensors):
        held = [tensor for name, tensor in manifest.tensors.items() if name.startswith(f"{kind}/")]
        elements = sum(math.prod(tensor.shape) for tensor in held)
        size = sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in held if tensor.dtype in DTYPES)
        dtypes = ", ".join(sorted({tensor.dtype for tensor in held}))
        yield f"{kind}: {len(held):,} tensors of {dtypes}, {elements:,} elements, {size:,} bytes"
    for group, values in metadata.get("config", {}).items():
        given = _not_default(group, values)
        if given:
            yield f"{group}: " + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in given.items())


def _not_default(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of one group that differ from their defaults."""
    defaults = {field.name: field.default for field in fields(GROUPS[group])} if group in GROUPS else {}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if name not in defaults or value != defaults[name]}
