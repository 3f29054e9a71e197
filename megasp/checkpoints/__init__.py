"""One checkpoint for any layout: safetensors per rank, a manifest of boxes, no pickle.

    directory = save("ckpt", step, shards, state, {"config": dataclasses.asdict(config)})
    manifest = load("ckpt", shards)

The layout that loads may be any other than the one that saved.
"""

from megasp.checkpoints.hf_reader import read_hugging_face
from megasp.checkpoints.manifest import Manifest, Shard, find_latest, read_manifest
from megasp.checkpoints.reader import CheckpointReader, check_same_model, load
from megasp.checkpoints.saver import Saver
from megasp.checkpoints.selection import newest_good
from megasp.checkpoints.writer import Retention, check_writable, save

__all__ = [
    "CheckpointReader",
    "Manifest",
    "Retention",
    "Saver",
    "Shard",
    "check_same_model",
    "check_writable",
    "find_latest",
    "load",
    "newest_good",
    "read_hugging_face",
    "read_manifest",
    "save",
]
