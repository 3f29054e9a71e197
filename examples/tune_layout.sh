#!/usr/bin/env bash
# Which layout for 70B? On a laptop: the answers, why not another one, a page to look at, and the script that starts it.
#   bash examples/tune_layout.sh
set -euo pipefail
JOB=(--model llama3-70b --gpus 64 --gpu h100-80 --seq-length 8192 --global-batch-size 512)
megasp plan "${JOB[@]}" --top 10 --html plan.html
megasp plan "${JOB[@]}" --explain tp8-pp4-dp2
megasp plan "${JOB[@]}" --launch slurm > run_70b.sh
echo "plan.html, run_70b.sh"
