#!/usr/bin/env bash
# A checkpoint of any layout as a Hugging Face model.
#   LOAD=ckpt-llama3-8b bash examples/convert_to_hf.sh
set -euo pipefail
OUTPUT="${OUTPUT:-hf-model}"
megasp convert to-hf --load "${LOAD:?a directory of checkpoints}" --output "$OUTPUT"
