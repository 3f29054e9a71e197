"""Tokenizing: `megasp preprocess` beside `tokenizers`' own encode_batch_fast, in one run, on the same cores.

    python benchmarks/preprocess.py [--vocab 16000] [--workers 1 2] [--megabytes 20] [--long 100]

The corpus is the Python standard library's sources, repeated to --megabytes. Prints a JSON line for each measurement:
MB/s of UTF-8 text in. The peer only encodes; megasp reads the files, encodes, writes the dataset, each time in a fresh
process, start-up and the proof of the fast encoder's ids included. --long N adds one document of N MB, as a text file
and as a JSON line, and peak memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

PEER = """
import json, sys, time
import tokenizers
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])
start = time.perf_counter()
for k in range(0, len(texts), 256):
    for encoding in tokenizer.encode_batch_fast(texts[k : k + 256], add_special_tokens=False):
        encoding.ids
print(time.perf_counter() - start)
"""


def sources() -> list[str]:
    """The standard library's .py files, installed packages left out, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "__pycache__"} & set(file.relative_to(root).parts):
            try:
                texts.append(file.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def emit(**values) -> None:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def preprocess(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (MB, of the largest process) of a `megasp preprocess`."""
    program = [sys.executable, "-m", "megasp.cli", "preprocess", "--append-eod", *arguments]
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", measured, *program], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, float(done.stdout)


def write_long(path: Path, texts: list[str], megabytes: int) -> None:
    """One document of so many MB: a plain text file, or one JSON line."""
    with path.open("w") as file:
        file.write('{"text": "' if path.suffix == ".jsonl" else "")
        while file.tell() < megabytes * 1e6:
            for text in texts[:200]:
                file.write(json.dumps(text)[1:-1] if path.suffix == ".jsonl" else text)
        file.write('"}\n' if path.suffix == ".jsonl" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"vocab": 16000, "megabytes": 20, "rounds": 3, "long": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    texts = sources()
    size = sum(len(text.encode()) for text in texts) / 1e6
    texts = (texts * (1 + int(options.megabytes / size)))[: max(1, int(len(texts) * options.megabytes / size))]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        corpus, model = Path(folder, "corpus.jsonl"), Path(folder, "tokenizer.json")
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        once = Path(folder, "once.jsonl")
        once.write_text("".join(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)))
        train = [sys.executable, "-m", "megasp.cli", "train-tokenizer", "--input", str(once)]
        subprocess.run(
            [*train, "--vocab-size", str(options.vocab), "--output", str(model)], check=True, stdout=subprocess.DEVNULL
        )
        for workers in options.workers:
            peer, ours, peaks = [], [], []
            for number in range(options.rounds):  # alternating, so that a busy machine is busy for both
                environment = dict(os.environ, RAYON_NUM_THREADS=str(workers), TOKENIZERS_PARALLELISM="true")
                program = [sys.executable, "-c", PEER, str(corpus), str(model)]
                done = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
                peer.append(float(done.stdout))
                flags = ["--input", str(corpus), "--tokenizer-model", str(model), "--workers", str(workers)]
                seconds, peak = preprocess(*flags, "--output-prefix", str(Path(folder, f"out{workers}-{number}")))
                ours.append(seconds)
                peaks.append(peak)
            rates = {"megasp": size / statistics.median(ours), "tokenizers": size / statistics.median(peer)}
            ratio = rates["megasp"] / rates["tokenizers"]
            emit(bench="mb_per_s", workers=workers, mb=size, **rates, ratio=ratio, peak_mb=max(peaks))
        for ending in ("txt", "jsonl") if options.long else ():
            long = Path(folder, f"long.{ending}")
            write_long(long, texts, options.long)
            flags = ["--input", str(long), "--tokenizer-model", str(model), "--workers", str(max(options.workers))]
            seconds, peak = preprocess(*flags, "--output-prefix", str(Path(folder, f"long-{ending}")))
            mb = long.stat().st_size / 1e6
            rate = {"mb_per_s": mb / seconds, "workers": max(options.workers), "peak_mb": peak}
            emit(bench="one_long_document", file=ending, mb=mb, **rate)


if __name__ == "__main__":
    main()
