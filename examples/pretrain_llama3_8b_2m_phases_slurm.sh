#!/usr/bin/env bash
# Llama 3 8B to a context of 2 million tokens by three phases of one run: each goes on from the last checkpoint with a
# longer sequence, a larger rotary base, and another layout, for any layout loads any checkpoint. 64 ranks on H100-80.
#   DATA=/data/long_documents_text_document TOKENIZER=/data/tokenizer.json \
#       sbatch examples/pretrain_llama3_8b_2m_phases_slurm.sh
# Started again it goes on in the phase that it was in. Every phase has 4M tokens a step, and begins a new epoch of
# whole long stretches (--start-new-epoch). With --load-hf DIR in the first phase it begins with a pretrained model.
#SBATCH --job-name=run-2m
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=48:00:00
#SBATCH --requeue
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
SAVE=${SAVE:-run-2m}

phase() {  # last step, tokens of a sample, samples of a step, rotary base, layout ...
    local last=$1 length=$2 batch=$3 base=$4
    shift 4
    local done=0
    if [ -f "$SAVE/latest" ]; then done=$((10#$(tr -cd 0-9 < "$SAVE/latest"))); fi
    if [ "$done" -ge "$last" ]; then return; fi
    srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
        --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID-$last" \
        pretrain_gpt.py \
        --model llama3-8b --seq-length "$length" --max-position-embeddings "$length" --rotary-base "$base" \
        --micro-batch-size 1 --global-batch-size "$batch" --train-iters "$last" --bf16 --start-new-epoch \
        --data-parallel-sharding-strategy optim_grads_params "$@" \
        --lr 1e-5 --lr-decay-style constant --lr-warmup-iters 50 --weight-decay 0.1 --adam-beta2 0.95 \
        --eval-iters 0 --save-interval 50 --log-interval 1 \
        --data-path "${DATA:?prefix of a .bin/.idx pair}" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer.json}" \
        --save "$SAVE" --load "$SAVE"
}

phase 500 131072 32 5000000 --ulysses-size 8 --recompute-granularity all-but-attention
phase 800 524288 8 20000000 --ulysses-size 8 --ring-size 2 --recompute-granularity all-but-attention
phase 1000 2097152 2 50000000 --ulysses-size 8 --ring-size 4 --recompute-granularity full --tiled-mlp 8
