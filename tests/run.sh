#!/usr/bin/env bash
# The whole test suite, from a fresh clone: makes a virtual environment if there is none, installs what tests need, runs.
#   bash tests/run.sh [--full] [pytest arguments]
# --full runs the property-based matrices whole instead of a seeded sample (a quarter of an hour more).
# Two processes share the tests; -n 8 takes more, and -n 0 runs them in pytest's own, where a debugger works.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh
ensure_environment dev
if [ "${1:-}" = "--full" ]; then
    shift
    export MEGASP_FULL_MATRIX=1
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
# worksteal: neighbours stay together, for fixtures of their file; who has none left takes half of the other's.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
