#!/usr/bin/env bash
# A Hugging Face Llama, Qwen or Mistral of about 8B goes on training at 131072 tokens: rotary positions stretched by
# yarn, every sample over the 8 GPUs of a node. 32 ranks = Ulysses 8 x data 4, ZeRO-3 over 32 ranks, on H100-80.
#   HF=/models/llama DATA=/data/long_documents_text_document sbatch examples/pretrain_from_hf_128k_slurm.sh
# Heads, layers and vocabulary are the model's; where its kv heads are fewer than 8, each is sent to several ranks.
# FACTOR: 131072 by the context that it was trained with. Afterwards: megasp convert to-hf --load run-hf-128k --output hf
#SBATCH --job-name=run-hf-128k
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    pretrain_gpt.py \
    --load-hf "${HF:?directory of a Hugging Face model}" --rotary-scaling yarn --rotary-scaling-factor "${FACTOR:-16}" \
    --seq-length 131072 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000 --bf16 \
    --ulysses-size 8 --data-parallel-sharding-strategy optim_grads_params --recompute-granularity all-but-attention \
    --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.1 --adam-beta2 0.95 \
    --eval-interval 200 --eval-iters 10 --save-interval 100 --log-interval 5 \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --save "${SAVE:-run-hf-128k}" --load "${SAVE:-run-hf-128k}" \
    "$@"
