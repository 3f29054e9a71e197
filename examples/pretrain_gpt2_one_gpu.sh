#!/usr/bin/env bash
# 1 rank = tensor 1 x pipeline 1 x Ulysses 1 x ring 1 x data 1
# on H100-80; `megasp plan` predicts 1.62 s a step and 11 GB a GPU. Start it in the directory of this repository.
set -euo pipefail
exec torchrun --standalone \
    --nproc-per-node 1 --max-restarts 3 \
    pretrain_gpt.py \
    --model gpt2-125m --attention-dropout 0.0 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 \
    --ulysses-size 1 --ring-size 1 --data-parallel-sharding-strategy no_shard --lr 0.00015 --min-lr 1.5e-05 \
    --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --micro-batch-size 16 --global-batch-size 512 --train-iters 100000 --bf16 --eval-interval 1000 --eval-iters 20 \
    --save-interval 500 --log-interval 10 \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
    --save "${SAVE:-run-tp1-pp1-u1-r1-dp1}" --load "${SAVE:-run-tp1-pp1-u1-r1-dp1}" \
    "$@"
