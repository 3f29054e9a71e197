"""Configurations that break one rule of `validate` each, with words of its sentence and values that themselves pass."""

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "group_query_attention": True,
    "num_query_groups": 4, "seq_length": 32,
    "position_embedding_type": "rope", "vocab_size": 512, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "mock_data": True, "train_iters": 10, "lr": 1e-3,
}  # fmt: skip
FP8 = {"bf16": True, "fp8_format": "hybrid"}
BLOCKS = FP8 | {"fp8_recipe": "mxfp8", "hidden_size": 256, "ffn_hidden_size": 256, "seq_length": 256}
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"


@dataclass(frozen=True)
class Case:
    """A configuration that breaks one rule.

    Args:
        id: name of the rule.
        given: what differs from `BASE`; "world" is the number of ranks.
        got, rule: words that the sentence must hold.
        cures: words of the fix -> what to change so that the configuration passes.
    """

    id: str
    given: dict[str, Any]
    got: str
    rule: str
    cures: dict[str, dict[str, Any]] = field(default_factory=dict)


def numbers(key: str, *values: Any, world: int | None = None) -> dict[str, dict[str, Any]]:
    """Cures of the kind "use 2 or 4"; with `world` a size of an axis, whose ranks are started with it."""
    return {str(v): {key: v} | ({"world": v * world} if world else {}) for v in values}


PROFILE = {"profile": True, "use_pytorch_profiler": True, "save": "x"}
HEADS12 = {"num_attention_heads": 12, "hidden_size": 96, "seq_length": 36, "make_vocab_size_divisible_by": 12}

CASES = [
    # The model
    Case("heads-hidden", {"num_attention_heads": 6, "num_query_groups": None}, "64 and num-attention-heads 6",
         "must divide the hidden size", numbers("num_attention_heads", 4, 8)),
    Case("heads-hidden-channels", {"num_attention_heads": 6, "num_query_groups": 2}, "6", "kv-channels",
         {"": {"kv_channels": 16}}),
    Case("groups", {"num_query_groups": 3}, "num-attention-heads 8 and num-query-groups 3", "equally many",
         numbers("num_query_groups", 2, 4)),
    Case("rotary", {"rotary_percent": 0.1}, "head size 8 and rotary-percent 0.1", "at least two channels",
         {"larger": {"kv_channels": 32}, "share": {"rotary_percent": 0.25}}),
    Case("scaling", {"rotary_scaling": "llama3", "position_embedding_type": "none"}, "--rotary-scaling llama3",
         "rotary", {"--position-embedding-type rope": {"position_embedding_type": "rope"}}),
    Case("scaling-factor", {"rotary_scaling": "linear"}, "--rotary-scaling linear", "by a factor",
         numbers("rotary_scaling_factor", 4)),
    Case("scaling-yarn", {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0}, "--rotary-scaling yarn",
         "trained with", {"--original-max-position-embeddings": {"original_max_position_embeddings": 16}}),
    Case("scaling-original", {"rotary_scaling": "ntk", "rotary_scaling_factor": 4.0,
         "original_max_position_embeddings": 16}, "--rotary-scaling ntk with --original-max-position-embeddings 16",
         "factor alone", {"leave the latter out": {"original_max_position_embeddings": None}}),
    Case("scaling-ntk", {"rotary_scaling": "ntk", "rotary_scaling_factor": 4.0, "rotary_percent": 0.25},
         "--rotary-scaling ntk of 2 channels", "first frequency", {"larger head": {"kv_channels": 16}}),
    Case("activations", {"swiglu": True, "squared_relu": True}, "--swiglu and --squared-relu", "one activation",
         {"leave one out": {"swiglu": False}}),
    Case("positions", {"position_embedding_type": "learned_absolute", "max_position_embeddings": 16},
         "seq-length 32 and max-position-embeddings 16", "must cover", numbers("max_position_embeddings", 32)),
    # The layout
    Case("world", {TP: 4, "world": 6}, "tensor 4 x pipeline 1 x Ulysses 1 x ring 1 = 4 on 6 ranks",
         "must divide the number of ranks", numbers("world", 4, 8) | numbers(TP, 2)),
    Case("world-ring", {"ring_size": 3, "world": 8, "seq_length": 48}, "ring 3 = 3 on 8 ranks",
         "must divide the number of ranks", numbers("world", 6, 9) | numbers("ring_size", 2, 4)),
    Case("world-ulysses", {"ulysses_size": 3, "world": 16, "seq_length": 48, "num_attention_heads": 8}, "on 16 ranks",
         "must divide the number of ranks", numbers("world", 15, 18) | numbers("ulysses_size", 2, 4)),
    Case("world-context", {CP: 6, "world": 16, "seq_length": 48}, "= 6 on 16 ranks",
         "must divide the number of ranks", numbers("world", 12, 18) | numbers(CP, 4, 8)),
    Case("cp-type", {"cp_comm_type": "ring"}, "cp-comm-type ring", "a2a, p2p, a2a+p2p, all_gather",
         {"a2a": {"cp_comm_type": "a2a"}}),
    Case("cp-a2a", {"ring_size": 2, "cp_comm_type": "a2a", "world": 2}, "cp-comm-type a2a with ulysses-size 1 and "
         "ring-size 2", "Ulysses alone", {"leave it out": {"cp_comm_type": None},
                                          "--ring-size 1": {"ring_size": 1, "ulysses_size": 2}}),
    Case("cp-ring", {"ulysses_size": 2, "cp_comm_type": "lightseq", "world": 2}, "cp-comm-type lightseq with "
         "ulysses-size 2 and ring-size 1", "the ring's ranks", {"--cp-comm-type a2a": {"cp_comm_type": "a2a"}}),
    Case("cp-both", {CP: 3, "cp_comm_type": "a2a+p2p", "world": 3, "seq_length": 33}, "context-parallel-size 3 with "
         "cp-comm-type a2a+p2p", "at least 2 ranks", {"--cp-comm-type p2p": {"cp_comm_type": "p2p"}}),
    Case("cp-product", {CP: 3, "ulysses_size": 2, "world": 2}, "context-parallel-size 3, ulysses-size 2, ring-size 1",
         "product", {"--context-parallel-size 2": {CP: 2}, "leave it out": {CP: None}}),
    # What each axis splits
    Case("tp-heads", {TP: 3, "world": 3}, "num-attention-heads 8 on tensor-model-parallel-size 3", "must divide it",
         numbers(TP, 2, 4, world=1)),
    Case("tp-ffn", {TP: 8, "ffn_hidden_size": 4, "world": 8}, "ffn-hidden-size 4 on tensor-model-parallel-size 8",
         "must divide it", numbers(TP, 4, world=1)),
    Case("tp-kv", HEADS12 | {TP: 4, "num_query_groups": 6, "world": 4},
         "num-query-groups 6 on tensor-model-parallel-size 4", "one must divide the other", numbers(TP, 3, 6, world=1)),
    Case("tp-vocab", {TP: 8, "vocab_size": 4, "make_vocab_size_divisible_by": 1, "world": 8},
         "padded vocabulary 4 on tensor-model-parallel-size 8", "must divide it", numbers(TP, 4, world=1)),
    Case("u-heads", {"ulysses_size": 6, TP: 2, "seq_length": 48, "world": 12},
         "ulysses-size 6 with 4 query heads per tensor-parallel rank (8 / 2)", "at least one head",
         {"--ulysses-size 3, and --ring-size": {"ulysses_size": 3, "ring_size": 2}}),
    Case("chunks", {"ulysses_size": 2, "ulysses_head_chunks": 5, "world": 2},
         "ulysses-head-chunks 5 with ulysses-size 2", "one of a Ulysses rank's query heads",
         numbers("ulysses_head_chunks", 4)),
    Case("chunks-ring", {"ulysses_size": 2, "ring_size": 2, "ulysses_head_chunks": 3, "world": 4},
         "ulysses-head-chunks 3 with ulysses-size 2 and ring-size 2", "with a ring one of its kv heads",
         numbers("ulysses_head_chunks", 2)),
    Case("chunks-alone", {"ring_size": 2, "ulysses_head_chunks": 2, "world": 2}, "with ulysses-size 1 and ring-size 2",
         "a Ulysses rank's", numbers("ulysses_head_chunks", 1)),
    Case("sinks", {"attention_sinks": 2}, "attention-sinks 2", "beyond a window", {
        "--window-size": {"window_size": 4}, "leave --attention-sinks out": {"attention_sinks": 0}}),
    Case("seq-split", {"ulysses_size": 4, "seq_length": 34, "world": 4}, "seq-length 34 over 4 ranks (context "
         "parallel 4)", "equally many tokens", numbers("seq_length", 32, 36)),
    Case("seq-split-sp", {"ulysses_size": 2, TP: 2, "sequence_parallel": True, "seq_length": 30, "world": 4},
         "seq-length 30 over 4 ranks (context parallel 2 x tensor parallel 2, with sequence parallelism)",
         "equally many tokens", numbers("seq_length", 28, 32)),
    # The batch
    Case("batch", {"micro_batch_size": 2, "global_batch_size": 6, "world": 2},
         "global-batch-size 6 with micro-batch-size 2 on data-parallel size 2", "a multiple of their product (4)",
         numbers("global_batch_size", 4, 8)),
    Case("batch-small", {"micro_batch_size": 4, "global_batch_size": 2, "world": 2}, "global-batch-size 2", "(8)",
         numbers("global_batch_size", 8)),
    # Training
    Case("no-length", {"train_iters": None}, "train-iters None and train-samples None", "exactly one",
         {"--train-iters": {"train_iters": 5}}),
    Case("two-lengths", {"train_samples": 5}, "train-iters 10 and train-samples 5", "exactly one",
         {"--train-iters": {"train_samples": None}}),
    Case("no-step", {"train_iters": None, "train_samples": 3, "global_batch_size": 4}, "0 steps", "at least one",
         {"longer": {"train_samples": 4}}),
    Case("warm-up twice", {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 2}, "--lr-warmup-fraction",
         "the same", {"leave one out": {"lr_warmup_iters": 0}}),
    Case("min-lr", {"min_lr": 2e-3}, "min-lr 0.002 and lr 0.001", "at most lr", {"--min-lr": {"min_lr": 1e-3}}),
    Case("decoupled-lr", {"decoupled_lr": 5e-4, "min_lr": 6e-4}, "min-lr 0.0006 and decoupled-lr 0.0005",
         "at most decoupled-lr", {"--min-lr": {"min_lr": 5e-4}}),
    Case("decoupled-min-lr", {"decoupled_lr": 5e-4, "decoupled_min_lr": 6e-4}, "decoupled-min-lr 0.0006 and decoupled-"
         "lr 0.0005", "at most decoupled-lr", {"--decoupled-min-lr": {"decoupled_min_lr": 5e-4}}),
    Case("decoupled alone", {"decoupled_min_lr": 6e-4}, "without --decoupled-lr", "would do nothing",
         {"add --decoupled-lr": {"decoupled_lr": 1e-3}}),
    Case("warm-up init", {"lr_warmup_init": 1.0}, "lr-warmup-init 1.0 and lr 0.001", "at most lr",
         {"--lr-warmup-init": {"lr_warmup_init": 0.0}}),
    Case("warm-up long", {"lr_warmup_iters": 10}, "warm-up of 10 steps and a decay that ends at step 10",
         "must end before", {"shorten": {"lr_warmup_iters": 9}}),
    Case("wsd", {"lr_decay_style": "WSD"}, "WSD", "has a length", {"--lr-wsd-decay-iters": {"lr_wsd_decay_iters": 2}}),
    Case("wsd long", {"lr_decay_style": "WSD", "lr_warmup_iters": 3, "lr_wsd_decay_iters": 8}, "of WSD of 8 steps "
         "of 7 after", "lies within them", {"shorten": {"lr_wsd_decay_iters": 7}}),
    Case("steps of samples", {"train_iters": None, "train_samples": 10, "lr_warmup_iters": 2},
         "--lr-warmup-iters 2 with --train-samples", "counts what says how long",
         {"--lr-warmup-samples": {"lr_warmup_iters": 0, "lr_warmup_samples": 2},
          "--train-iters": {"train_iters": 5, "train_samples": None}}),
    Case("samples of steps", {"lr_decay_samples": 8}, "--lr-decay-samples 8 with --train-iters", "else steps",
         {"--lr-decay-iters": {"lr_decay_iters": 8, "lr_decay_samples": None}}),
    Case("samples long", {"train_iters": None, "train_samples": 10, "lr_warmup_samples": 10},
         "warm-up of 10 samples and a decay that ends at sample 10", "end before", {"": {"lr_warmup_samples": 9}}),
    Case("finetune alone", {"finetune": True}, "--finetune without --load", "would do nothing",
         {"add --load": {"load": "x"}, "leave --finetune out": {"finetune": False}}),
    Case("wsd phase alone", {"lr_wsd_decay_iters": 2}, "without --lr-decay-style WSD", "would do nothing",
         {"--lr-decay-style WSD": {"lr_decay_style": "WSD"}}),
    Case("no data", {"mock_data": False}, "no --data-path", "needs a corpus",
         {"--data-path": {"data_path": ("x",)}, "--mock-data": {"mock_data": True}}),
    # Data
    Case("ramp numbers", {"rampup_batch_size": (2, 2)}, "--rampup-batch-size 2 2 with", "three positive numbers"),
    Case("ramp increments", {"rampup_batch_size": (2, 4, 100), "global_batch_size": 8}, "2 4 100", "whole increments"),
    Case("ramp passes", {"rampup_batch_size": (3, 1, 100), "global_batch_size": 8, "micro_batch_size": 2}, "3 1 100",
         "multiples of micro-batch-size x data-parallel size (2)",
         {"2 2 800": {"rampup_batch_size": (2, 2, 800)}}),
    Case("two sources", {"data_path": ("a",)}, "--data-path and --mock-data", "the same thing",
         {"keep --data-path": {"mock_data": False}}),
    Case("sets of a split", {"data_path": ("a",), "mock_data": False, "valid_data_path": ("b",)}, "--valid-data-path",
         "shares of it", {"--train-data-path": {"train_data_path": ("a",), "data_path": ()}}),
    Case("no validation", {"train_data_path": ("a",), "mock_data": False}, "--train-data-path", "a validation set",
         {"--valid-data-path": {"valid_data_path": ("b",)}, "--eval-iters 0": {"eval_iters": 0}}),
    Case("split of a training set", {"train_data_path": ("a",), "mock_data": False, "split": "90,5,5", "eval_iters": 0},
         "--split 90,5,5 with --train-data-path", "it divides --data-path",
         {"leave --split out": {"split": "969,30,1"}}),
    Case("sets of one name", {"train_data_path": ("a",), "mock_data": False, "multiple_validation_sets": True,
         "valid_data_path": ("x/b", "y/b")}, "['b', 'b']", "its file name the set's",
         {"different names": {"valid_data_path": ("x/b", "y/c")}}),
    Case("megatron mock", {"data_order": "megatron"}, "--data-order megatron with --mock-data", "orders corpora",
         {"leave one out": {"data_order": "keyed"}}),
    Case("packing mock", {"document_packing": "best-fit"}, "--document-packing best-fit with --mock-data",
         "documents of a corpus", {"leave one out": {"document_packing": "stream"}}),
    Case("packing megatron", {"data_path": ("a",), "mock_data": False, "document_packing": "best-fit",
         "data_order": "megatron"}, "--document-packing best-fit with --data-order megatron", "the keyed order",
         {"leave one out": {"data_order": "keyed"}}),
    Case("eod alone", {"eod_starts_document": True}, "--eod-starts-document", "nothing depends on documents",
         {"--reset-position-ids": {"reset_position_ids": True}}),
    Case("no vocabulary", {"vocab_size": None}, "no vocabulary", "its size",
         {"--tokenizer-type": {"tokenizer_type": "ByteTokenizer"}, "--vocab-size": {"vocab_size": 300}}),
    Case("sp alone", {"sequence_parallel": True}, "--sequence-parallel with tensor-model-parallel-size 1",
         "tensor-parallel ranks", {"leave it out": {"sequence_parallel": False},
                                   "--ulysses-size": {"sequence_parallel": False, "ulysses_size": 2, "world": 2}}),
    Case("order of mock", {"data_order": "megatron"}, "--data-order megatron with --mock-data", "orders corpora",
         {"leave one out": {"mock_data": False, "data_path": ("a",)}}),
    Case("eod", {"eod_starts_document": True}, "--eod-starts-document", "nothing depends on documents",
         {"--reset-position-ids": {"reset_position_ids": True}}),
    # Sharding, precision
    Case("instances", {"num_distributed_optimizer_instances": 3, "use_distributed_optimizer": True, "world": 4},
         "num-distributed-optimizer-instances 3 on data-parallel size 4", "equally many",
         numbers("num_distributed_optimizer_instances", 2, 4)),
    Case("instances alone", {"num_distributed_optimizer_instances": 2, "world": 4}, "2 without sharding", "share out",
         {"--use-distributed-optimizer": {"use_distributed_optimizer": True}}),
    Case("zero2 deferred", {"data_parallel_sharding_strategy": "optim_grads", "pipeline_schedule": "zb-h1", PP: 2,
                            "world": 4}, "optim_grads with --pipeline-schedule zb-h1", "ZeRO-1 in disguise",
         {"optim": {"data_parallel_sharding_strategy": "optim"}, "1f1b": {"pipeline_schedule": "1f1b"}}),
    Case("rotary percent", {"position_embedding_type": "none", "rotary_percent": 0.5}, "--rotary-percent 0.5 with",
         "of rotary positions", {"rope": {"position_embedding_type": "rope"}, "": {"rotary_percent": 1.0}}),
    Case("rotary base", {"position_embedding_type": "learned_absolute", "rotary_base": 5e5}, "--rotary-base 500000 w",
         "of rotary positions", {"leave --rotary-base out": {"rotary_base": 10000.0}}),
    Case("bf16 and fp16", {"bf16": True, "fp16": True}, "--bf16 and --fp16", "one of them", {"": {"fp16": False}}),
    Case("bf16 gradients", {"grad_reduce_in_bf16": True}, "without --bf16", "gradients in bfloat16",
         {"leave it out": {"grad_reduce_in_bf16": False}}),
    Case("bf16 and fp32 gradients", {"bf16": True, "grad_reduce_in_bf16": True, "weight_gradient_dtype": "fp32"},
         "--weight-gradient-dtype fp32 with --grad-reduce-in-bf16", "are made in it",
         {"leave one out": {"grad_reduce_in_bf16": False}, "": {"weight_gradient_dtype": "auto"}}),
    Case("loss scale alone", {"hysteresis": 3}, "--hysteresis without --fp16", "do nothing",
         {"add --fp16": {"fp16": True}, "leave --hysteresis out": {"hysteresis": None}}),
    Case("two loss scales", {"fp16": True, "loss_scale": 128.0, "loss_scale_window": 100},
         "--loss-scale with --loss-scale-window", "does not change", {"": {"loss_scale_window": None}}),
    Case("fp8 without bf16", {"fp8_format": "hybrid"}, "--fp8-format hybrid without --bf16", "bfloat16 activations",
         {"--bf16": {"bf16": True}}),
    Case("fp8 recipe alone", {"fp8_recipe": "rowwise"}, "--fp8-recipe without --fp8-format", "do nothing",
         {"add --fp8-format": FP8, "leave --fp8-recipe out": {"fp8_recipe": None}}),
    Case("delayed scaling", FP8 | {"fp8_recipe": "delayed"}, "--fp8-recipe delayed", "never from steps before",
         {"--fp8-recipe tensorwise": {"fp8_recipe": "tensorwise"}}),
    Case("unknown recipe", FP8 | {"fp8_recipe": "exact"}, "--fp8-recipe exact", "tensorwise, rowwise",
         {"tensorwise": {"fp8_recipe": "tensorwise"}}),
    Case("number of bf16 layers alone", FP8 | {"num_layers_at_end_in_bf16": 1}, "--num-layers-at-end-in-bf16 1 without",
         "do nothing", {"add --first-last-layers-bf16": {"first_last_layers_bf16": True, "num_layers": 3}}),
    Case("no layer in fp8", FP8 | {"first_last_layers_bf16": True}, "num-layers 2", "no layer for --fp8-format",
         {"fewer": {"num_layers_at_end_in_bf16": 0}}),
    Case("fp8 width", FP8 | {"ffn_hidden_size": 200}, "MLP's hidden layer, 200", "a multiple of 16",
         {"another width": {"ffn_hidden_size": 208}}),
    Case("fp8 tokens", FP8 | {"seq_length": 8}, "tokens of a microbatch, 8", "a multiple of 16",
         {"--micro-batch-size": {"micro_batch_size": 2}}),
    Case("fp8 blocks", BLOCKS | {"ffn_hidden_size": 320}, "MLP's hidden layer, 320",
         "mxfp8 scales need every size to be a multiple of 128", {"another width": {"ffn_hidden_size": 256}}),
    Case("fp8 blocks of a shard", BLOCKS | {TP: 2, "world": 2, "sequence_parallel": True, "seq_length": 384},
         "tokens of a microbatch, 192", "a multiple of 128",
         {"another --seq-length": {"seq_length": 512}}),
    Case("fp8 rows of a package", FP8 | {"fp8_recipe": "rowwise", "fp8_backend": "transformer-engine"},
         "--fp8-backend transformer-engine with --fp8-recipe rowwise", "tensorwise, blockwise, mxfp8 alone",
         {"--fp8-backend torch": {"fp8_backend": "torch"}}),
    Case("fp8 package of a GPU", FP8 | {"fp8_backend": "transformer-engine"}, "--fp8-backend transformer-engine",
         "runs on cuda, not on cpu", {"--fp8-backend auto": {"fp8_backend": "auto"}}),
    Case("fp8 backend alone", {"fp8_backend": "torch"}, "--fp8-backend without --fp8-format", "do nothing",
         {"add --fp8-format": FP8, "leave --fp8-backend out": {"fp8_backend": None}}),
    Case("fp8 tiles", FP8 | {"seq_length": 48, "tiled_mlp": 2}, "a tile's tokens, 24", "a multiple of 16",
         {"--tiled-mlp": {"tiled_mlp": 3}}),
    Case("norms of a GPU", {"norm_backend": "apex"}, "--norm-backend apex", "runs on cuda, not on cpu",
         {"auto": {"norm_backend": "auto"}}),
    Case("optimizer of a GPU", {"optimizer_backend": "transformer-engine"}, "--optimizer-backend transformer-engine",
         "runs on cuda, not on cpu", {"auto": {"optimizer_backend": "auto"}}),
    Case("smallest loss scale", {"fp16": True, "initial_loss_scale": 2.0, "min_loss_scale": 4.0}, "4 and initial",
         "or above", {"--min-loss-scale 2": {"min_loss_scale": 2.0}}),
    # Profiling
    Case("profile alone", {"profile_step_end": 5}, "options of --profile", "do nothing",
         {"--profile": PROFILE | {"profile_step_end": 15}}),
    Case("profile of no step", PROFILE | {"profile_step_start": 4, "profile_step_end": 4}, "start 4 and profile-step-"
         "end 4", "up to the other", {"end later": {"profile_step_end": 5}}),
    Case("profile of no rank", PROFILE | {"profile_ranks": (0, 2), "world": 2}, "profile-ranks 0 2 of 2 ranks",
         "are profiled", {"0 to 1": {"profile_ranks": (0, 1)}}),
    Case("profile to nowhere", {"profile": True, "use_pytorch_profiler": True}, "--use-pytorch-profiler", "files",
         {"--tensorboard-dir": {"tensorboard_dir": "x"}}),
    Case("nsys of a CPU", {"profile": True}, "--profile on a CPU", "on a GPU", {"--use-pytorch-profiler": PROFILE}),
    # Kernels
    Case("kernel-dropout", {"attention_backend": "flash", "attention_dropout": 0.1}, "--attention-backend flash",
         "flash: it has no attention dropout", {"--attention-dropout 0": {"attention_dropout": 0.0},
                                                "unfused": {"attention_backend": "unfused"}}),
    Case("kernel-device", {"attention_backend": "fused", "bf16": True}, "--attention-backend fused",
         "fused: it runs on cuda, not on cpu", {"auto": {"attention_backend": "auto"}}),
]  # fmt: skip
