"""Training step of a Llama-3-8B-shaped model on one CUDA device: tokens/s, MFU and peak memory, bf16.

    python -m benchmarks.gpu.train_step [--layers N] [--sequence 8192] [--peer-layers 2]

First megasp alone with each attention kernel and as many layers as fit (estimated, fewer if memory runs out). Then
megasp and transformers, few enough layers that all stay in memory, take turns as on a CPU; losses must agree to 2e-2.
MFU counts the causal half of attention (see megasp/model/flops.py). Without a CUDA device it says so and ends.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping

import torch

from benchmarks.contest import Contestant, ContestantFailed, Outcome, Spread, play, record, table
from benchmarks.train_step import TOLERANCES, same_loss
from benchmarks.trainers import make_megasp, make_transformers, version
from benchmarks.workload import LEARNING_RATE, batch, llama
from megasp.config.schema import Config
from megasp.model.flops import flops_per_token, mfu, parameter_count, tflops_per_device
from megasp.training.devices import peak_tflops

KERNELS = ("flash", "fused")
BYTES_PER_PARAMETER = 18
"""bf16 weight 2, fp32 master 4, two moments 8, fp32 gradient 4."""
ACTIVATION_CHANNELS = 24
"""bf16 numbers kept per token and layer, in units of the hidden size; on the safe side."""


def shape(layers: int, sequence: int) -> Config:
    """Llama 3 8B (arXiv 2407.21783, table 3) with another number of layers; one sample a step."""
    config = llama(
        layers=layers, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, sequence=sequence, batch=1
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, rotary_base=500000.0))


def layers_that_fit(sequence: int, memory: int) -> int:
    """An estimate from parameters and activations, with a tenth of the memory left for the rest."""
    one, two = (parameter_count(shape(layers, sequence).model) for layers in (1, 2))
    ends, layer = 2 * one - two, two - one
    each = BYTES_PER_PARAMETER * layer + ACTIVATION_CHANNELS * sequence * 4096 * 2
    return max(1, min(32, int((0.9 * memory - BYTES_PER_PARAMETER * ends) // each)))


def contestant(config: Config, kernel: str) -> Contestant:
    return Contestant(
        f"megasp, {kernel}", make_megasp, (config, "bf16", LEARNING_RATE, batch, "cuda", kernel), threads=4
    )


def alone(kernel: str, layers: int, args: argparse.Namespace) -> tuple[Outcome, int]:
    """One kernel, with fewer layers each time that memory runs out."""
    while True:
        try:
            [outcome] = play([contestant(shape(layers, args.sequence), kernel)], args.rounds, args.warmup)
            return outcome, layers
        except ContestantFailed as error:
            if "OutOfMemoryError" not in str(error) or layers == 1:
                raise
            layers -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="as many as fit without it")
    parser.add_argument("--peer-layers", type=int, default=2, help="layers where a peer takes turns; 0 leaves it out")
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device here")
        return
    properties = torch.cuda.get_device_properties(0)
    peak = peak_tflops(torch.device("cuda", 0), torch.bfloat16)
    layers = args.layers or layers_that_fit(args.sequence, properties.total_memory)
    print(f"## Training step on {properties.name}, Llama-3-8B shape, s {args.sequence}, bf16\n")
    print("| kernel | layers | tokens/s | TFLOP/s | MFU | peak GiB |\n|---|---|---|---|---|---|")
    lines = []
    for kernel in KERNELS:
        outcome, fitted = alone(kernel, layers, args)
        speed = Spread.of([args.sequence / call.seconds for call in outcome.calls])
        tflops = tflops_per_device(speed.median, flops_per_token(shape(fitted, args.sequence).model, args.sequence), 1)
        used = mfu(tflops, peak)
        share = "n/a" if used is None else f"{used:.1%}"
        print(
            f"| {kernel} | {fitted} | {speed.text(0)} | {tflops:.0f} | {share} | {outcome.peak_gib:.1f} |", flush=True
        )
        lines.append({"kernel": kernel, "layers": fitted, "tokens_per_s": speed.json(), "tflops": tflops, "mfu": used})
    result = {"benchmark": "gpu/train_step", "device": properties.name, "sequence": args.sequence, "alone": lines}
    if args.peer_layers:
        config = shape(args.peer_layers, args.sequence)
        everyone = [contestant(config, kernel) for kernel in KERNELS]
        arguments = (config, "bf16", LEARNING_RATE, batch, "cuda")
        everyone.append(Contestant("transformers", make_transformers, arguments, threads=4))

        def same(losses: Mapping[str, float]) -> None:
            same_loss(losses, TOLERANCES["bf16"], everyone[0].name)

        outcomes = play(everyone, args.rounds, args.warmup, same)
        print(f"\n{args.peer_layers} layers, in turns:\n\n{table(outcomes, ('tokens', args.sequence))}")
        result["beside"] = record(outcomes)
    print(json.dumps(result | {"versions": [f"torch {torch.__version__}", version("transformers")]}))


if __name__ == "__main__":
    main()
