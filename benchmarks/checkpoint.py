"""Saving and loading checkpoints, beside torch.save, safetensors and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint [--gigabytes 1] [--rounds 7] [--directory DIR] [--only saving]

The same tensors (fp32, blocks of a Llama) for all, in one run, taking turns. Every save ends with fsync of its files;
megasp hashes them, too, and publishes atomically. Loads fill tensors that exist, from files in the page cache; megasp's
checks the hashes first. Then, of megasp alone:

    resharding     the halves of both of two tensor-parallel ranks, of what one rank saved, beside the whole as one
                   rank; two thirds of the bytes by rows and a third by columns, as in a model, and then all by columns
    stall          what a step loses to a save in the background, beside a save in the foreground
    conversion     to Hugging Face and back of a model with the layers of Llama 3 8B (--layers of them), in bf16, beside
                   a plain copy of the same files
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Spread, play, ratio, record, table
from megasp.checkpoints import Retention, Saver, Shard, load, save
from megasp.checkpoints.hf_reader import canonical_shapes
from megasp.checkpoints.hugging_face import from_hf, to_hf
from megasp.config.presets import PRESETS
from megasp.config.schema import Config, ModelConfig
from megasp.parallel_state import ParallelState
from megasp.parameters import split, whole

SINGLE = ParallelState.single()


SHAPES = {
    "attention.q": (1024, 1024),
    "attention.k": (1024, 1024),
    "attention.v": (1024, 1024),
    "attention.o": (1024, 1024),
    "mlp.gate": (4096, 1024),
    "mlp.up": (4096, 1024),
    "mlp.down": (1024, 4096),
}
BY_COLUMNS = ("attention.o", "mlp.down")


def tensors(gigabytes: float) -> dict[str, Tensor]:
    """Blocks of a Llama, of 64 MiB each, until there are enough."""
    generator, found = torch.Generator().manual_seed(0), {}
    blocks = itertools.count()
    while sum(tensor.nbytes for tensor in found.values()) < gigabytes * 1e9:
        block = next(blocks)
        for name, shape in SHAPES.items():
            found[f"layers.{block}.{name}.weight"] = torch.empty(shape).uniform_(generator=generator)
        found[f"layers.{block}.norm.weight"] = torch.ones(1024)
    return found


def shards(state: dict[str, Tensor]) -> list[Shard]:
    return [Shard("model", tensor, (whole(name, tuple(tensor.shape)),)) for name, tensor in state.items()]


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def way(name: str, state: dict[str, Tensor], path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Save to, and load from a path."""
    if name == "megasp":
        return lambda: save(path, 1, shards(state), SINGLE, {}), lambda: load(path, shards(state))
    if name == "dcp":
        import torch.distributed.checkpoint as dcp

        def write() -> None:
            dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True))

        return write, lambda: dcp.load(dict(state), storage_reader=dcp.FileSystemReader(path))
    from safetensors.torch import load_file, save_file

    def put() -> None:
        path.mkdir(exist_ok=True)
        torch.save(state, path / "file") if name == "torch.save" else save_file(state, path / "file")
        sync(path / "file")
        sync(path)

    def get() -> None:
        file = path / "file"
        read = torch.load(file, weights_only=True) if name == "torch.save" else load_file(file)
        for key, tensor in state.items():
            tensor.copy_(read[key])

    return put, get


class Turn:
    """One contestant's save, or load."""

    def __init__(self, name: str, loading: bool, gigabytes: float, directory: str) -> None:
        self.loading, self.path = loading, Path(directory, f"{name}-{loading}")
        self.put, self.get = way(name, tensors(gigabytes), self.path)
        if loading:
            self.put()

    def prepare(self, index: int) -> None:
        """What one wrote before must not cost the next."""
        if not self.loading:
            shutil.rmtree(self.path, ignore_errors=True)
            os.sync()

    def __call__(self, index: int) -> None:
        (self.get if self.loading else self.put)()


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def resharding(gigabytes: float, directory: Path, rounds: int, all_by_columns: bool) -> Spread:
    """Time of loading both halves of two tensor-parallel ranks over that of loading what one rank saved."""
    state = tensors(gigabytes)
    save(directory, 1, shards(state), SINGLE, {})
    halves: list[list[Shard]] = [[], []]
    for rank, (name, tensor) in itertools.product(range(2), state.items()):
        shape = tuple(tensor.shape)
        dim = int(len(shape) == 2 and (all_by_columns or any(part in name for part in BY_COLUMNS)))
        piece = split(name, shape, rank, 2, dim) if len(shape) == 2 else whole(name, shape)
        halves[rank].append(Shard("model", torch.zeros(piece.box.size), (piece,)))

    def same() -> None:
        load(directory, shards(state), verify_hashes=False)

    def other() -> None:
        for half in halves:
            load(directory, half, verify_hashes=False)

    ratios = [seconds(other) / seconds(same) for _ in range(rounds + 1)][1:]
    shutil.rmtree(directory)
    return Spread.of(ratios)


def stall(gigabytes: float, directory: Path, rounds: int) -> tuple[Spread, Spread]:
    """Seconds that a step of half a second loses to a save in the background; of a save that it waits for."""
    held = shards(tensors(gigabytes))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    lost, waits = [], []
    with Saver(directory, SINGLE, Retention(last=1), background=True, optimizer=optimizer) as saver:
        for step in range(0, 2 * rounds + 2, 2):
            blocked = seconds(partial(saver.save, step, held, {}))
            time.sleep(0.5)  # what computes leaves a core to the copy, as on a device
            lost.append(blocked + seconds(optimizer.step))
            assert saver.wait() is None
            waits.append(seconds(partial(save, directory, step + 1, held, SINGLE, {}, Retention(last=1))))
    return Spread.of(lost[1:]), Spread.of(waits[1:])


class PeakMemory:
    """The most anonymous memory of this process (what is not a file's pages) beyond that at the start, in GB."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._start, self._end = 0.0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.peak = max(self.peak, self._now() - self._start)

    def _now(self) -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e9


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        sync(path)


def convert(pipe: Any, layers: int, directory: str) -> None:
    """GB/s and peak memory of to_hf and from_hf, and of a copy of the files."""
    values = {k: v for k, v in PRESETS["llama3-8b"].items() if k != "seq_length"} | {"num_layers": layers}
    model, root = ModelConfig(**values), Path(directory)
    shapes = canonical_shapes(model)
    zeros = [Shard("model", torch.zeros((), dtype=torch.bfloat16).expand(s), (whole(n, s),)) for n, s in shapes.items()]
    config = asdict(Config(model=model))
    config["training"]["bf16"] = True
    save(root / "ckpt", 1, zeros, SINGLE, {"config": config})
    size = sum(file.stat().st_size for file in (root / "ckpt").rglob("*.safetensors")) / 1e9
    found = {"GB": size, "largest tensor GB": max(2 * math.prod(shape) for shape in shapes.values()) / 1e9}
    ways = {
        "copy": partial(copy, root / "ckpt", root / "copy"),
        "to_hf": partial(to_hf, root / "ckpt", root / "hf"),
        "from_hf": partial(from_hf, root / "hf", root / "back"),
    }
    for name, action in ways.items():
        os.sync()
        with PeakMemory() as memory:
            found[f"{name} GB/s"] = size / seconds(action)
        found[f"{name} peak GB"] = memory.peak
    pipe.send({name: round(value, 2) for name, value in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4, help="of Llama 3 8B, with its embedding and head, to convert")
    parser.add_argument("--directory", default=None)
    parser.add_argument("--only", choices=("saving", "loading", "resharding", "stall", "conversion"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megasp-checkpoint-", dir=args.directory) as name:
        if args.only in (None, "saving"):
            contest(args.gigabytes, args.rounds, name, loading=False)
        if args.only in (None, "loading"):
            contest(args.gigabytes, args.rounds, name, loading=True)
        if args.only in (None, "resharding"):
            for all_by_columns in (False, True):
                ratio = resharding(args.gigabytes, Path(name, "reshard"), args.rounds, all_by_columns)
                print(f"resharding / same layout{', all by columns' if all_by_columns else ''}: {ratio.text()}")
        if args.only in (None, "stall"):
            lost, waits = stall(args.gigabytes, Path(name, "stall"), args.rounds)
            share = lost.median / waits.median
            print(
                f"stall in the background: {lost.text(4)} s, {share:.1%} of a save in the foreground ({waits.text()} s)"
            )
        if args.only in (None, "conversion"):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=convert, args=(theirs, args.layers, name))
            process.start()
            print(f"conversion of {args.layers} layers of Llama 3 8B, with embedding and head: {ours.recv()}")
            process.join()


def contest(gigabytes: float, rounds: int, directory: str, loading: bool) -> None:
    """Everybody's save, or load, in turns."""
    names = ("megasp", "safetensors", "torch.save", "dcp")
    outcomes = play([Contestant(peer, Turn, (peer, loading, gigabytes, directory)) for peer in names], rounds, 1)
    print(f"## {'Loading' if loading else 'Saving'} {gigabytes:g} GB\n")
    print(table(outcomes, ("MB", 1000 * gigabytes)), "\n")
    for peer in outcomes[1:]:
        print(f"{peer.contestant.name} / megasp: {ratio(peer, outcomes[0]).text()}")
    print(json.dumps({"benchmark": "checkpoint", "loading": loading, "contestants": record(outcomes)}), "\n")
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir()


if __name__ == "__main__":
    main()
