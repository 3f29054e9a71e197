#!/usr/bin/env bash
# The benchmarks of training, Ulysses and opening data, one after the other, as a Markdown file for RESULTS.md.
#   bash benchmarks/run_all.sh [FILE]        build/benchmarks.md without FILE; takes about half an hour when quiet
# Run it on an otherwise idle machine: the load that it writes at the start of each part says whether it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh
ensure_environment bench
out="${1:-build/benchmarks.md}"
mkdir -p "$(dirname "$out")"
{
    echo "# $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
    echo "$(nproc) x $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(uname -sr)"
} > "$out"
part() {
    echo "running: $*"
    {
        echo
        echo "    $*      # load average before: $(cut -d' ' -f1 /proc/loadavg)"
        echo
    } >> "$out"
    # Peers chat on stderr; it is shown only where the benchmark fails.
    "$PYTHON" "${@:2}" >> "$out" 2> "$out.stderr" || { cat "$out.stderr"; exit 1; }
}
part python -m benchmarks.train_step --dtype fp32
part python -m benchmarks.train_step --dtype bf16
part python -m benchmarks.train_step --dtype fp32 --tp 2
part python -m benchmarks.ulysses
part python -m benchmarks.open_dataset
part python -m benchmarks.converge
part python -m benchmarks.gpu.train_step
part python -m benchmarks.gpu.offload
rm -f "$out.stderr"
echo "written: $out"
