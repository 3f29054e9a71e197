"""Megatron-LM's flags that megasp refuses, by reason."""

_OTHER_MODELS = "megasp pretrains decoder-only language models"
_NOT_YET = "it is not built yet"

_BY_REASON: tuple[tuple[str, str], ...] = (
    # Precision
    (
        "the loss and the softmax of attention are always computed in fp32",
        "--fp16-lm-cross-entropy --apply-query-key-layer-scaling",
    ),
    (
        "fp8 scales follow from what is multiplied, never from steps before",
        "--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo",
    ),
    (
        "with --fp8-format all three products of a linear layer are in fp8: what it keeps of its input is",
        "--no-fp8-wgrad",
    ),
    (
        "with --fp8-format weights are kept and gathered in bf16, and cast for each product",
        "--fp8-param-gather --keep-fp8-transpose-cache --reuse-grad-buf-for-mxfp8-param-ag",
    ),
    (
        "fp8 recipes are --fp8-format and --fp8-recipe tensorwise, rowwise, blockwise or mxfp8, and fp4 is not built "
        "yet",
        "--fp8-quantizer-factory --fp4-format --fp4-recipe --fp4-quantizer-factory --fp4-param-gather "
        "--kitchen-config-file --kitchen-recipe-number",
    ),
    (
        "with --bf16 activations are in bf16, while matrix products, norms and softmax accumulate in fp32",
        "--fp32-residual-connection --disable-bf16-reduced-precision-matmul",
    ),
    (
        "optimizer states and master weights are always fp32, and gradients unless --grad-reduce-in-bf16 is given",
        "--main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype",
    ),
    # Sharding of the optimizer and of the weights
    (
        "weights are gathered block by block as the forward reaches them, and buffers are PyTorch's: choose what is "
        "sharded by --data-parallel-sharding-strategy",
        "--overlap-param-gather-with-optimizer-step --no-align-param-gather --torch-fsdp2-no-reshard-after-forward "
        "--init-model-with-meta-device --fsdp-double-buffer --suggested-communication-unit-size "
        "--distrib-optim-fully-reshardable-mem-efficient",
    ),
    (
        "with --num-distributed-optimizer-instances weights, gradients and optimizer states are sharded over the same "
        "ranks, and replicated over the others",
        "--enable-full-sharding-in-hsdp",
    ),
    (
        "buckets and buffers of gradient reduction are not for tuning here, and gradients are summed, never averaged",
        "--ddp-num-buckets --ddp-bucket-size --ddp-pad-buckets-for-high-nccl-busbw "
        "--ddp-reduce-scatter-with-fp32-accumulation --ddp-average-in-collective --no-align-grad-reduce "
        "--no-gradient-reduce-div-fusion --use-contiguous-parameters-in-local-ddp --DDP-impl",
    ),
    # Other parallelism
    (
        "layers are balanced by their work, the output layer's included: to choose another split use "
        "--pipeline-model-parallel-layout",
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
        "--pipeline-model-parallel-split-rank --standalone-embedding-stage",
    ),
    ("groups are of --pipeline-model-parallel-size microbatches", "--microbatch-group-size-per-virtual-pipeline-stage"),
    (
        "--pipeline-schedule zb-h1 and zbv defer the weight gradients of every layer but the output layer's",
        "--defer-embedding-wgrad-compute --wgrad-deferral-limit",
    ),
    (
        "messages between stages always overlap computation, in a group for each direction of two ranks",
        "--no-overlap-p2p-communication --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p "
        "--pipeline-model-parallel-comm-backend",
    ),
    (
        "the split of the context-parallel ranks is given by --ulysses-size and --ring-size, or chosen",
        "--hierarchical-context-parallel-sizes --hybrid-context-parallel --max-seqlen-per-dp-cp-rank",
    ),
    (
        "ranks are ordered tensor, context, data, pipeline, fastest first, and NCCL is tuned by its environment "
        "variables",
        "--use-tp-pp-dp-mapping --nccl-communicator-config-path --high-priority-stream-groups --use-sharp "
        "--sharp-enabled-group --use-nccl-ub --disable-symmetric-registration "
        "--distributed-timeout-seconds-after-init --lazy-mpu-init",
    ),
    (
        "it tunes Transformer Engine's user buffers, which megasp does not use",
        "--tp-comm-overlap-cfg --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad "
        "--disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --tp-comm-bootstrap-backend "
        "--disable-tp-comm-split-ag --disable-tp-comm-split-rs",
    ),
    (
        "it was renamed long ago: use --tensor-model-parallel-size",
        "--model-parallel-size",
    ),
    # Memory
    (
        "it was renamed long ago: use --recompute-granularity, --recompute-method and --recompute-num-layers",
        "--checkpoint-activations --activations-checkpoint-method --activations-checkpoint-granularity "
        "--activations-checkpoint-num-layers",
    ),
    (
        "each kind of offloading has its own flag: --cpu-offloading-activations, --optimizer-cpu-offload, "
        "--cpu-offloading-weights",
        "--cpu-offloading",
    ),
    (
        "what travels between host and device is in pinned memory, a bucket of it at a time",
        "--no-pin-cpu-grads --no-pin-cpu-params",
    ),
    (
        "CUDA graphs are not built yet",
        "--enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-scope --cuda-graph-warmup-steps "
        "--te-rng-tracker --inference-rng-tracker",
    ),
    # Batches and steps
    (
        "the global batch is exactly --global-batch-size, and every batch is trained on",
        "--decrease-batch-size-if-needed --iterations-to-skip",
    ),
    (
        "it was renamed long ago: use --micro-batch-size",
        "--batch-size",
    ),
    (
        "it was renamed long ago: use --lr-warmup-iters or --lr-warmup-fraction",
        "--warmup",
    ),
    (
        "learning rates are --lr and --decoupled-lr, and weight decay is constant: use --weight-decay",
        "--start-weight-decay --end-weight-decay --dump-param-to-param-group-map --head-lr-mult",
    ),
    (
        "the schedule comes from this run's flags, never from a checkpoint: repeat them, as the effective config "
        "beside the checkpoint lists them",
        "--use-checkpoint-opt-param-scheduler --use-checkpoint-opt_param-scheduler",
    ),
    (
        "the optimizer is AdamW (--optimizer adam)",
        "--sgd-momentum --muon-momentum --muon-no-split-qkv --muon-use-nesterov --muon-scale-mode "
        "--muon-fp32-matmul-prec --muon-num-ns-steps --muon-tp-mode --muon-extra-scale-factor",
    ),
    # The model
    (
        "the MLP is GELU, --squared-relu or --swiglu",
        "--quick-geglu --geglu --activation-func-clamp-value --glu-linear-offset --onnx-safe "
        "--use-fused-weighted-squared-relu",
    ),
    (
        "norms stand before attention and MLP, and have weights: use --normalization",
        "--apply-residual-connection-post-layernorm --qk-l2-norm",
    ),
    (
        "every layer has the same window (--window-size)",
        "--window-attn-skip-freq",
    ),
    (
        "rotary positions are those of Llama and GPT-NeoX (--rotary-base, --rotary-percent, --rotary-scaling), on "
        "every layer",
        "--rotary-interleaved --no-rope-freq --mrope-section "
        "--relative-attention-num-buckets --relative-attention-max-distance",
    ),
    (
        "weights are drawn from a normal distribution with --init-method-std, in every layout and on every replica "
        "the same",
        "--embedding-init-method-std --init-method-xavier-uniform --data-parallel-random-init --no-initialization",
    ),
    (
        "the embedding has --vocab-size rows, padded to a multiple of --make-vocab-size-divisible-by",
        "--padded-vocab-size --vocab-extra-ids",
    ),
    (
        "mixtures of experts are not built yet: megasp pretrains dense models",
        "--num-experts --moe-layer-freq --moe-ffn-hidden-size --moe-shared-expert-intermediate-size "
        "--moe-shared-expert-overlap --moe-grouped-gemm --moe-use-legacy-grouped-gemm --moe-layer-recompute "
        "--moe-extended-tp --moe-use-upcycling --moe-router-load-balancing-type --moe-router-dtype "
        "--moe-router-fusion --moe-router-score-function --moe-router-topk --moe-router-pre-softmax "
        "--moe-router-num-groups --moe-router-group-topk --moe-router-topk-scaling-factor "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate --moe-router-force-load-balancing "
        "--moe-router-padding-for-fp8 --moe-aux-loss-coeff --moe-z-loss-coeff --moe-input-jitter-eps "
        "--moe-per-layer-logging --moe-token-dispatcher-type --moe-enable-deepep --moe-deepep-num-sms "
        "--moe-permute-fusion --moe-expert-capacity-factor --moe-pad-expert-input-to-capacity --moe-token-drop-policy "
        "--moe-apply-probs-on-input --moe-upcycling-granularity --moe-pad-experts-for-cuda-graph-inference "
        "--overlap-moe-expert-parallel-comm --delay-wgrad-compute",
    ),
    (
        "multi-latent attention is not built yet: use --group-query-attention",
        "--multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
        "--mscale --mscale-all-dim --cache-mla-latents",
    ),
    (
        "prediction of several tokens at a time is not built yet",
        "--mtp-num-layers --mtp-loss-scaling-factor",
    ),
    (
        "all layers are alike, and their code is megasp/model",
        "--spec --heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json "
        "--hybrid-attention-ratio --hybrid-mlp-ratio --hybrid-override-pattern --mamba-state-dim --mamba-head-dim "
        "--mamba-num-groups --mamba-num-heads --is-hybrid-model --disable-mamba-mem-eff-path --use-legacy-models "
        "--enable-experimental",
    ),
    (
        f"{_OTHER_MODELS}: this flag is of BERT, T5 or another encoder",
        "--bert-no-binary-head --bert-load --bert-embedder-type --output-bert-embeddings --mask-prob --short-seq-prob "
        "--decoder-num-layers --decoder-seq-length --retriever-seq-length --sample-rate --ict-head-size --ict-load "
        "--biencoder-projection-dim --biencoder-shared-query-context-model --titles-data-path --query-in-block-prob "
        "--use-one-sent-docs --evidence-data-path --retriever-report-topk-accuracies --retriever-score-scaling "
        "--block-data-path --embedding-path --indexer-batch-size --indexer-log-interval",
    ),
    (
        f"{_OTHER_MODELS}: this flag is of Retro",
        "--retro-project-dir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers "
        "--retro-encoder-hidden-dropout --retro-encoder-attention-dropout --retro-num-neighbors "
        "--retro-num-retrieved-chunks --retro-attention-gate --retro-no-verify-neighbor-count",
    ),
    (
        f"{_OTHER_MODELS}: this flag is of a vision model",
        "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction "
        "--no-data-sharding --vision-pretraining --vision-pretraining-type --vision-backbone-type "
        "--swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size "
        "--dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer "
        "--dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs",
    ),
    (
        "megasp pretrains: fine-tuning on instructions and reinforcement learning are other programs' work",
        "--sft --sft-tokenizer-prompt-format --perform-rl-step --rl-prompts-per-eval --grpo-prompts-per-step "
        "--grpo-group-size --grpo-iterations --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta "
        "--grpo-entropy-term-weight --grpo-filter-groups-with-same-reward --grpo-default-temperature "
        "--grpo-default-top-p --langrl-inference-server-type --langrl-inference-server-conversation-template "
        "--langrl-external-server --langrl-env-config --rl-offload-optimizer-during-inference "
        "--rl-offload-kv-cache-during-training --rl-remove-kv-cache-during-training --rl-reset-cuda-graphs "
        "--rl-partial-rollouts --rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef "
        "--rl-calculate-intra-group-similarity --rl-use-sequence-packing --rl-sequence-packing-bin-size "
        "--rl-sequence-packing-algo",
    ),
    (
        "pretraining serves nobody: `megasp generate` samples from a checkpoint",
        "--inference-batch-times-seqlen-threshold --max-tokens-to-oom --flash-decode --use-legacy-static-engine "
        "--inference-max-requests --inference-max-seq-length --inference-max-batch-size --inference-dynamic-batching "
        "--inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-block-size "
        "--inference-dynamic-batching-buffer-guaranteed-fraction --inference-dynamic-batching-buffer-overflow-factor "
        "--inference-dynamic-batching-max-requests-override --inference-dynamic-batching-max-tokens-override "
        "--inference-dynamic-batching-num-cuda-graphs --inference-dynamic-batching-track-paused-request-events "
        "--inference-dynamic-batching-unified-memory-level --decode-only-cuda-graphs --symmetric-ar-type "
        "--nccl-all-reduce-for-prefill --mlp-chunks-for-prefill --disable-chunked-prefill "
        "--inference-wandb-logging-step-interval",
    ),
    # Data
    (
        "tokenizers are the files that --tokenizer-type names, and never run code of their own; TikTokenizer has "
        "Megatron-LM's 1000 special tokens",
        "--tokenizer-metadata --tiktoken-num-special-tokens --tiktoken-special-tokens "
        "--legacy-tokenizer --trust-remote-code",
    ),
    (
        "corpora are named on the command line or in --config FILE.yaml: use --data-path, or --train-data-path with "
        "--valid-data-path and --test-data-path",
        "--data-args-path --per-split-data-args-path",
    ),
    (
        "token files are read from local paths, and padding is not marked by a token",
        "--object-storage-cache-path --allow-ambiguous-pad-tokens",
    ),
    (
        "evaluation is --eval-iters steps every --eval-interval steps",
        "--full-validation --skip-train --test-mode",
    ),
    # Checkpoints
    (
        "checkpoints have one format, safetensors with a JSON manifest, which any layout loads",
        "--dist-ckpt-format --ckpt-convert-format --ckpt-convert-save --auto-detect-ckpt-format "
        "--ckpt-convert-update-legacy-dist-opt-format --no-ckpt-fully-parallel-save --dist-ckpt-strictness "
        "--dist-ckpt-save-pre-mcore-014 --load-main-params-from-ckpt --no-strict-fsdp-dtensor-load",
    ),
    (
        "there is one kind of checkpoint, in --save, of which --keep-last and --keep-every say what stays",
        "--non-persistent-save-interval --non-persistent-ckpt-type "
        "--non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo "
        "--replication --replication-jump --replication-factor",
    ),
    (
        "flags never come from a checkpoint: the effective config beside it is a file for --config",
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args",
    ),
    (
        "weights to start from are given by --load DIR --finetune",
        "--pretrained-checkpoint",
    ),
    (
        "--load takes the latest checkpoint of its directory",
        "--ckpt-step",
    ),
    (
        "without a checkpoint in --load training starts anew, and says so: look into the directory before you start",
        "--exit-on-missing-checkpoint",
    ),
    # Resilience
    (
        f"{_NOT_YET}: a run that breaks is started again and resumes from its last checkpoint",
        "--inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval "
        "--inprocess-monitor-process-interval --inprocess-progress-watchdog-interval --inprocess-heartbeat-interval "
        "--inprocess-soft-timeout --inprocess-hard-timeout --inprocess-heartbeat-timeout --inprocess-barrier-timeout "
        "--inprocess-completion-timeout --inprocess-last-call-wait --inprocess-termination-grace-time "
        "--inprocess-granularity --inprocess-active-world-size --inprocess-empty-cuda-cache --enable-ft-package "
        "--calc-ft-timeouts --adlr-autoresume --adlr-autoresume-interval",
    ),
    (
        f"{_NOT_YET}: watch the loss and the gradient norm in the metrics",
        "--no-check-for-nan-in-loss-and-grad --check-for-nan-in-loss-and-grad --check-for-spiky-loss "
        "--check-for-large-grads --error-injection-rate --error-injection-type --result-rejected-tracker-filename "
        "--check-weight-hash-across-dp-replicas-interval --deterministic-mode --train-sync-interval",
    ),
    # Logging and profiling
    (
        "metrics go to --tensorboard-dir and to --metrics-file: import either into Weights & Biases",
        "--wandb-project --wandb-entity --wandb-exp-name --wandb-save-dir",
    ),
    (
        "the metrics are loss, gradient norm, learning rate, tokens, speed and memory",
        "--log-params-norm --log-num-zeros-in-grad --log-timers-to-tensorboard --log-energy --log-straggler "
        "--disable-straggler-on-startup --straggler-ctrlr-port --straggler-minmax-count "
        "--run-workload-inspector-server --one-logger-project --one-logger-run-name --one-logger-async "
        "--app-tag-run-name --app-tag-run-version --logging-level",
    ),
    (
        "the effective config is stored with every run, and --print-config shows it",
        "--config-logger-dir",
    ),
    (
        "what memory holds is counted by `megasp memory` and measured in the metrics",
        "--record-memory-history --memory-snapshot-path",
    ),
    (
        "flags in a file are given by --config FILE.yaml, under their own names",
        "--yaml-cfg",
    ),
)

REFUSED: dict[str, str] = {flag: reason for reason, flags in _BY_REASON for flag in flags.split()}
"""flag -> why it is refused and what to use instead; reads on after "--flag is not supported: "."""
