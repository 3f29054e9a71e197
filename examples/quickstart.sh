#!/usr/bin/env bash
# From nothing to a trained, exported, talking model on four ranks of a laptop. Everything goes to ./quickstart-run.
#   bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '+ %s\n' "$*"; "$@"; }

say "1. A virtual environment with megasp and its dependencies"
ensure_environment hf

OUT=quickstart-run
rm -rf "$OUT"
mkdir "$OUT"
LIBRARY=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
TEXT=(--input "$LIBRARY" --extensions .py --exclude site-packages dist-packages encodings pydoc_data --skip-bad-lines)
TOKENIZER=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer.json")
DATA="$OUT/stdlib_text_document"

say "2. A tokenizer of 8192 tokens, trained on the sources of Python's standard library (30 MB that are already here)"
run megasp train-tokenizer "${TEXT[@]}" --vocab-size 8192 --output "$OUT/tokenizer.json"

say "3. The same text as tokens: .bin and .idx, the files that Megatron-LM reads"
run megasp preprocess "${TEXT[@]}" "${TOKENIZER[@]}" --output-prefix "$OUT/stdlib" --append-eod --workers 2
run megasp data inspect "$DATA" "${TOKENIZER[@]}"

say "4. Do tensor parallel 2 x Ulysses 2, and data parallel 2 x tensor parallel 2, train as one process does? (fp64)"
run megasp verify --layout tp2-u2 --layout dp2-tp2 --sequence-parallel

say "5. Pretraining on 4 ranks (tensor parallel 2 x Ulysses 2, sequence parallel), with a checkpoint half-way"
train() {
    run torchrun --standalone --nproc-per-node 4 pretrain_gpt.py --config examples/tiny.yaml \
        --tensor-model-parallel-size 2 --ulysses-size 2 --sequence-parallel --data-path "$DATA" "${TOKENIZER[@]}" "$@"
}
export OMP_NUM_THREADS=1
train --save "$OUT/ckpt" --save-interval 250 --tensorboard-dir "$OUT/tensorboard"

say "6. As if it had been stopped half-way: resume there, and compare the losses with those of the unbroken run"
mkdir "$OUT/stopped"
cp -r "$OUT/ckpt/step_00000250" "$OUT/stopped"
train --load "$OUT/stopped" --save "$OUT/stopped" --exit-interval 270
"$PYTHON" - "$OUT" <<'EOF'
import json, pathlib, sys

def losses(name):
    rows = map(json.loads, (pathlib.Path(sys.argv[1]) / name).read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}

unbroken, resumed = losses("ckpt/metrics.jsonl"), losses("stopped/metrics.jsonl")
different = [step for step in resumed if resumed[step] != unbroken[step]]
assert resumed and not different, f"losses differ at steps {different}"
print(f"the losses of steps {min(resumed)} to {max(resumed)} are equal to the last bit")
last = sorted(unbroken)[-20:]
print(f"loss: {unbroken[1]:.2f} at the first step, {sum(unbroken[step] for step in last) / len(last):.2f} over the last 20")
EOF

say "7. Export to Hugging Face safetensors, loaded there with transformers"
run megasp convert to-hf --load "$OUT/ckpt" --output "$OUT/hf"
"$PYTHON" - "$OUT/hf" <<'EOF'
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
text = "def __init__(self, name):\n        self.name = name\n"
tokens = tokenizer(text, return_tensors="pt")
print(f"transformers loads a {type(model).__name__} of {model.num_parameters():,} parameters; "
      f"its loss on two lines of Python is {model(**tokens, labels=tokens.input_ids).loss.item():.2f}")
EOF

say "8. What it has learned: a sample that goes on from 'def '"
run megasp generate --load "$OUT/ckpt" --prompt "def " --max-new-tokens 160 --temperature 0.6

say "Done. What to try next"
cat <<EOF
  source .venv/bin/activate
  tensorboard --logdir $OUT/tensorboard                  # the curves
  megasp data explain $DATA --step 100 --seq-length 256 --global-batch-size 8 --split 95,5,0
  megasp verify --layout u4 --layout tp4 --layout dp8    # any layout against one process
  megasp pretrain --model llama3-8b --print-config       # a whole configuration, as a YAML file
  megasp doctor                                          # what this machine has
  docs/getting_started.md                                # the same steps one by one, with your own text
EOF
