"""One checkpoint for any layout: safetensors per rank, a manifest of boxes, no pickle.

    directory = save("ckpt", step, shards, state, {"config": dataclasses.asdict(config)})
    manifest = load("ckpt", shards)

The layout that loads may be any other than the one that saved.
"""

from megasp.checkpoints.manifest import Manifest, Shard, find_latest, read_manifest
from megasp.checkpoints.reader import CheckpointReader, check_same_model, load
from megasp.checkpoints.writer import check_writable, save

__all__ = [
    "CheckpointReader",
    "Manifest",
    "Shard",
    "check_same_model",
    "check_writable",
    "find_latest",
    "load",
    "read_manifest",
    "save",
]
