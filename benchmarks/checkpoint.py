"""Saving and loading checkpoints, beside torch.save, safetensors and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint [--gigabytes 1] [--rounds 5] [--directory DIR]

The same tensors (fp32 matrices of 4 and 16 MiB and vectors) for all, in one run, taking turns. Every save ends with
fsync of its files; megasp hashes them, too, and publishes atomically. Loads fill tensors that exist, from files in the
page cache; megasp's checks the hashes first. Then, of megasp alone:

    resharding     two tensor-parallel ranks' halves, by columns, of what one rank saved, beside the same as one rank
    stall          what a step loses to a save in the background, beside a save in the foreground
    conversion     to Hugging Face and back of a model with the layers of Llama 3 8B (--layers of them)
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contestant, play, ratio, record, table
from megasp.checkpoints import Saver, Shard, load, save
from megasp.checkpoints.hf_reader import canonical_shapes
from megasp.checkpoints.hugging_face import from_hf, to_hf
from megasp.config.presets import PRESETS
from megasp.config.schema import Config, ModelConfig
from megasp.parallel_state import ParallelState
from megasp.parameters import split, whole

SINGLE = ParallelState.single()


def tensors(gigabytes: float) -> dict[str, Tensor]:
    generator, found, left = torch.Generator().manual_seed(0), {}, gigabytes * 1e9
    while left > 0:
        rows = 1024 if len(found) % 3 else 4096
        weight = torch.empty(rows, 1024).uniform_(generator=generator)
        found[f"layers.{len(found)}.weight"] = weight
        found[f"layers.{len(found)}.norm"] = torch.ones(1024)
        left -= weight.nbytes
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


def make(name: str, loading: bool, gigabytes: float, directory: str) -> Callable[[int], Any]:
    state, path = tensors(gigabytes), Path(directory, f"{name}-{loading}")
    put, get = way(name, state, path)
    if loading:
        put()

    def call(index: int) -> None:
        if loading:
            get()
            return
        shutil.rmtree(path, ignore_errors=True)
        put()

    return call


def seconds(action: Callable[[], Any], rounds: int) -> float:
    """The fastest of some calls."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        took.append(time.perf_counter() - began)
    return min(took)


def resharding(gigabytes: float, directory: Path, rounds: int) -> float:
    """Time of loading halves by columns over that of loading what was saved."""
    state = tensors(gigabytes)
    save(directory, 1, shards(state), SINGLE, {})
    halves = [
        [
            Shard(
                "model",
                tensor[:, rank * 512 : rank * 512 + 512].clone(),
                (split(name, tuple(tensor.shape), rank, 2, 1),),
            )
            for name, tensor in state.items()
            if tensor.dim() == 2
        ]
        for rank in range(2)
    ]
    whole_time = seconds(lambda: load(directory, shards(state), verify_hashes=False), rounds)
    return seconds(lambda: [load(directory, half, verify_hashes=False) for half in halves], rounds) / whole_time


def stall(gigabytes: float, directory: Path, rounds: int) -> tuple[float, float]:
    """Seconds that a step of half a second loses to a save in the background; of a save that it waits for."""
    held = shards(tensors(gigabytes))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter])
    with Saver(directory, SINGLE, background=True, optimizer=optimizer) as saver:
        lost = []
        for step in range(1, rounds + 1):
            began = time.perf_counter()
            saver.save(step, held, {})
            blocked = time.perf_counter() - began
            time.sleep(0.5)  # what computes leaves a core to the copy, as on a device
            began = time.perf_counter()
            optimizer.step()
            lost.append(blocked + time.perf_counter() - began)
            assert saver.wait() is None
    return min(lost), seconds(lambda: save(directory, rounds + 1, held, SINGLE, {}), rounds)


def convert(pipe: Any, layers: int, directory: str) -> None:
    """GB/s of from_hf and to_hf, and the peak of anonymous host memory in GB above the start's."""
    values = {k: v for k, v in PRESETS["llama3-8b"].items() if k != "seq_length"} | {"num_layers": layers}
    model, root = ModelConfig(**values), Path(directory)
    shapes = canonical_shapes(model)
    zeros = [Shard("model", torch.zeros((), dtype=torch.bfloat16).expand(s), (whole(n, s),)) for n, s in shapes.items()]
    config = asdict(Config(model=model))
    config["training"]["bf16"] = True
    save(root / "ckpt", 1, zeros, SINGLE, {"config": config})
    size = sum(file.stat().st_size for file in (root / "ckpt").rglob("*.safetensors"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = seconds(lambda: to_hf(root / "ckpt", root / "hf"), 1)
    back = seconds(lambda: from_hf(root / "hf", root / "back"), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send(
        {"GB": size / 1e9, "to_hf GB/s": size / 1e9 / out, "from_hf GB/s": size / 1e9 / back, "RSS GB": peak / 1e6}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--directory", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megasp-checkpoint-", dir=args.directory) as name:
        for loading in (False, True):
            contestants = [
                Contestant(peer, make, (peer, loading, args.gigabytes, name))
                for peer in ("megasp", "safetensors", "torch.save", "dcp")
            ]
            outcomes = play(contestants, args.rounds, 1)
            print(f"## {'Loading' if loading else 'Saving'} {args.gigabytes:g} GB\n")
            print(table(outcomes, ("MB", 1000 * args.gigabytes)), "\n")
            for peer in outcomes[1:]:
                print(f"{peer.contestant.name} / megasp: {ratio(peer, outcomes[0]).text()}")
            print(json.dumps({"benchmark": "checkpoint", "loading": loading, "contestants": record(outcomes)}), "\n")
        print(f"resharding / same layout: {resharding(args.gigabytes, Path(name, 'reshard'), args.rounds):.2f}")
        lost, waits = stall(args.gigabytes, Path(name, "stall"), args.rounds)
        print(f"stall in the background: {lost:.3f} s, {lost / waits:.1%} of a save in the foreground ({waits:.2f} s)")
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=convert, args=(theirs, args.layers, name))
        process.start()
        print(f"conversion of {args.layers} layers of Llama 3 8B: {ours.recv()}")
        process.join()


if __name__ == "__main__":
    main()
