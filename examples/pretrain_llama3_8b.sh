#!/usr/bin/env bash
# Llama 3 8B on one node of 8 GPUs: tensor parallel 4 with sequence parallelism, Ulysses 2.
#   DATA=/data/corpus_text_document TOKENIZER=/data/tokenizer.json bash examples/pretrain_llama3_8b.sh [more flags]
set -euo pipefail
cd "$(dirname "$0")/.."
exec torchrun --standalone --nproc-per-node 8 pretrain_gpt.py --model llama3-8b \
    --tensor-model-parallel-size 4 --sequence-parallel --ulysses-size 2 \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
    --bf16 --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 128 --train-iters 100000 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000 \
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --eval-interval 1000 --eval-iters 20 --log-interval 10 \
    --save "${SAVE:-ckpt-llama3-8b}" --load "${SAVE:-ckpt-llama3-8b}" --save-interval 1000 "$@"
