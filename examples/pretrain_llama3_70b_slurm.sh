#!/usr/bin/env bash
# Llama 3 70B on 16 nodes of 8 GPUs under Slurm: tensor parallel 8 inside a node, 4 pipeline stages, Ulysses 2 (each
# sample of 8192 tokens is shared by 2 GPUs of a stage's shard), 2 replicas, whose 4 GPUs share out optimizer states
# (ZeRO-1). Each GPU holds 70.6e9 / 32 parameters at 6 + 16 / 4 bytes, about 22 GB, before activations.
#   DATA=/data/corpus_text_document TOKENIZER=/data/tokenizer.json sbatch examples/pretrain_llama3_70b_slurm.sh
#SBATCH --job-name=llama3-70b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Saves and stops a quarter of an hour before Slurm would kill it.
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    pretrain_gpt.py --model llama3-70b \
    --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --ulysses-size 2 \
    --use-distributed-optimizer \
    --data-path "${DATA:?prefix of a .bin/.idx pair}" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
    --bf16 --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 512 --train-iters 100000 \
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000 \
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --eval-interval 1000 --eval-iters 20 --log-interval 10 \
    --exit-duration-in-mins 1425 \
    --save "${SAVE:-ckpt-llama3-70b}" --load "${SAVE:-ckpt-llama3-70b}" --save-interval 500 "$@"
