#!/usr/bin/env bash
# 256 ranks = tensor 1 x pipeline 1 x Ulysses 8 x ring 1 x data 32, ZeRO-3 over 256 ranks
# on H100-80; `megasp plan` predicts 71.1 s a step and 74 GB a GPU. Start it in the directory of this repository.
#SBATCH --job-name=run-tp1-pp1-u8-r1-dp32-zero3
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    pretrain_gpt.py \
    --model llama3-70b --use-rope-scaling --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --ulysses-size 8 \
    --ring-size 1 --data-parallel-sharding-strategy optim_grads_params --lr 0.00015 --min-lr 1.5e-05 \
    --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --seq-length 131072 --micro-batch-size 1 --global-batch-size 64 --train-iters 100000 --bf16 \
    --attention-backend fused --eval-interval 1000 --eval-iters 20 --recompute-granularity all-but-attention \
    --save-interval 500 --log-interval 10 \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
    --save "${SAVE:-run-tp1-pp1-u8-r1-dp32-zero3}" --load "${SAVE:-run-tp1-pp1-u8-r1-dp32-zero3}" \
    "$@"
