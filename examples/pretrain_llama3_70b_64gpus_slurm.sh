#!/usr/bin/env bash
# 64 ranks = tensor 4 x pipeline 4 x Ulysses 1 x ring 1 x data 4, ZeRO-1 over 4 ranks
# on H100-80; `megasp plan` predicts 64.8 s a step and 78 GB a GPU. Start it in the directory of this repository.
#SBATCH --job-name=run-tp4-pp4-u1-r1-dp4-zero1
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    pretrain_gpt.py \
    --model llama3-70b --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --pipeline-schedule 1f1b \
    --ulysses-size 1 --ring-size 1 --sequence-parallel --data-parallel-sharding-strategy optim --lr 0.00015 \
    --min-lr 1.5e-05 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 \
    --clip-grad 1.0 --seq-length 8192 --micro-batch-size 1 --global-batch-size 512 --train-iters 100000 --bf16 \
    --attention-backend fused --eval-interval 1000 --eval-iters 20 --recompute-granularity selective \
    --recompute-modules layernorm mlp_act --save-interval 500 --log-interval 10 \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
    --save "${SAVE:-run-tp4-pp4-u1-r1-dp4-zero1}" --load "${SAVE:-run-tp4-pp4-u1-r1-dp4-zero1}" \
    "$@"
