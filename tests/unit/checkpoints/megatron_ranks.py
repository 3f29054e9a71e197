"""Checkpoints that megatron-core itself writes, on gloo ranks of a CPU, for the tests of `convert from-megatron`.

`write_all` runs on two ranks: it trains small GPT models by megatron-core's own schedule and optimizers, saves them by
`dist_checkpointing.save` and as `mp_rank_*` files, as Megatron-LM does, and trains on, for the losses to compare with.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megasp.data import IndexedDataset, IndexedDatasetBuilder
from megasp.data.megatron_order import MegatronDataset

VOCAB, SEQ, BATCH, SAVED_AT, STEPS, SEED = 250, 16, 4, 2, 4, 7
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, and how it is trained and saved.

    Attributes:
        llama: RMSNorm, SwiGLU, grouped queries, rotary, a head of its own; else GPT-2's architecture, tied.
        sharding: of the distributed optimizer's state; the plain optimizer without it.
        metadata: what else `sharded_state_dict` is told.
    """

    name: str
    llama: bool = True
    tp: int = 1
    pp: int = 1
    bf16: bool = False
    sharding: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    qk_layernorm: bool = False


CASES = (
    Case("llama-tp2", tp=2, qk_layernorm=True),
    Case("gpt2-pp2", llama=False, pp=2),
    Case("llama-dp2", bf16=True, sharding="fully_reshardable", metadata={"singleton_local_shards": True}),
    Case("gpt2-dp2", llama=False, sharding="fully_reshardable"),
    Case("gpt2-bf16", llama=False, bf16=True, tp=2),
    Case("buckets", sharding="dp_reshardable"),
)


def write_corpus(prefix: Path) -> str:
    random = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as made:
        for length in random.integers(5, 60, 60):
            made.add_document(random.integers(0, VOCAB, length))
    return str(prefix)


def samples(corpus: str) -> MegatronDataset:
    """Those of the run, in Megatron-LM's order."""
    return MegatronDataset(IndexedDataset(corpus), (0, 60), SEQ, SEED, STEPS * BATCH)


def probe() -> torch.Tensor:
    """Tokens to compare logits on, [BATCH, SEQ]."""
    return torch.from_numpy(np.random.RandomState(0).randint(0, VOCAB, (BATCH, SEQ)))


def write_all(root: Path, corpus: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Write `root/NAME` for each case. Returns what each trained and holds on this rank, by name."""
    patch_cuda()
    return {case.name: write(root / case.name, case, corpus) for case in CASES if case.name in names}


def patch_cuda() -> None:
    """Let megatron-core run without CUDA; in this process alone, before megatron is imported."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda: Any = torch.cuda
    cuda.current_device, cuda.synchronize = (lambda: torch.device("cpu")), (lambda *a, **k: None)
    for name in ("zeros", "ones", "empty", "tensor"):
        setattr(torch, name, functools.partial(_on_cpu, getattr(torch, name)))
    plain = torch.Tensor.type

    def cuda_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[assignment,method-assign]
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    results: queue.Queue[Any] = queue.Queue()  # in this process, instead of in a server of its own
    filesystem_async._get_write_results_queue = lambda: results
    random.CudaRNGStatesTracker.fork = lambda self, *a, **k: contextlib.nullcontext()


def _on_cpu(made: Any, *args: Any, **kwargs: Any) -> Any:
    if str(kwargs.get("device")).startswith("cuda"):
        kwargs["device"] = "cpu"
    return made(*args, **kwargs)


def arguments(case: Case, corpus: str) -> argparse.Namespace:
    """What Megatron-LM keeps of a run's flags in its checkpoints."""
    shape = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "max_position_embeddings": SEQ,
        "seq_length": SEQ, "norm_epsilon": 1e-5, "add_qkv_bias": False, "qk_layernorm": case.qk_layernorm,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2, "make_vocab_size_divisible_by": 16,
        "vocab_size": VOCAB, "padded_vocab_size": 256, "rotary_base": 5000, "rotary_percent": 1.0,
        "num_experts": None, "multi_latent_attention": False, "squared_relu": False, "window_size": None,
    }  # fmt: skip
    kind = {
        "ffn_hidden_size": 48, "group_query_attention": True, "num_query_groups": 2, "normalization": "RMSNorm",
        "swiglu": True, "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
    } if case.llama else {
        "ffn_hidden_size": 128, "group_query_attention": False, "num_query_groups": 1, "normalization": "LayerNorm",
        "swiglu": False, "add_bias_linear": True, "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
    }  # fmt: skip
    run = {
        "tensor_model_parallel_size": case.tp, "pipeline_model_parallel_size": case.pp, "micro_batch_size": 1,
        "global_batch_size": BATCH, "train_iters": STEPS, "train_samples": None, "seed": SEED, "lr": 1e-2,
        "min_lr": 1e-3, "lr_decay_style": "linear", "lr_decay_iters": None, "lr_warmup_iters": 0, "weight_decay": 0.1,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "clip_grad": 1.0, "bf16": case.bf16, "fp16": False,
        "params_dtype": torch.bfloat16 if case.bf16 else torch.float32, "iteration": 0, "consumed_train_samples": 0,
        "tokenizer_type": "NullTokenizer", "data_path": [corpus], "rampup_batch_size": None,
        "optimizer": "adam", "split": "1", "eval_iters": 0, "lr_decay_samples": None,
        "use_distributed_optimizer": case.sharding is not None,
    }  # fmt: skip
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    enums = {"model_type": ModelType.encoder_or_decoder, "attention_backend": AttnBackend.auto}
    return argparse.Namespace(**shape, **kind, **run, **enums)


def build(case: Case, args: argparse.Namespace) -> tuple[Any, Any]:
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    dtype = torch.bfloat16 if case.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, kv_channels=args.kv_channels,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        normalization=args.normalization, layernorm_epsilon=args.norm_epsilon, qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu if args.swiglu else gelu_tanh,
        add_bias_linear=args.add_bias_linear, hidden_dropout=0.0, attention_dropout=0.0,
        init_method_std=args.init_method_std, use_cpu_initialization=True, perform_initialization=True,
        tensor_model_parallel_size=case.tp, pipeline_model_parallel_size=case.pp, params_dtype=dtype,
        pipeline_dtype=dtype, bf16=case.bf16, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm)
    model = GPTModel(
        config, layer, vocab_size=args.padded_vocab_size, max_sequence_length=SEQ,
        pre_process=ps.is_pipeline_first_stage(), post_process=ps.is_pipeline_last_stage(),
        position_embedding_type=args.position_embedding_type, rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, too, must matter
                parameter.add_(torch.linspace(-0.1, 0.1, len(parameter)) * (1 + len(name) % 3))
    return config, model


def write(folder: Path, case: Case, corpus: str) -> dict[str, Any]:
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    ps.initialize_model_parallel(case.tp, case.pp)
    torch.manual_seed(3)
    args, data = arguments(case, corpus), samples(corpus)
    config, bare = build(case, args)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=case.sharding is not None),
        Float16Module(config, bare) if case.bf16 else bare,
    )
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=args.lr, weight_decay=args.weight_decay, adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2, adam_eps=args.adam_eps, clip_grad=args.clip_grad, bf16=case.bf16,
            params_dtype=args.params_dtype, use_distributed_optimizer=case.sharding is not None,
        ),
        [model],
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    schedule = get_forward_backward_func()
    losses = []

    def forward(data: Any, model: Any) -> Any:
        row = next(data)[None]
        out = model(row[:, :-1], torch.arange(SEQ)[None], None, labels=row[:, 1:])
        return out, lambda tokens: ((mean := tokens.float().mean()), {"loss": mean.detach().clone()})

    def step(number: int) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        rows = [data.sample(number * BATCH + row).tokens(0, SEQ + 1).astype(np.int64) for row in range(BATCH)]
        share = torch.from_numpy(np.stack(rows)).chunk(ps.get_data_parallel_world_size())[ps.get_data_parallel_rank()]
        out = schedule(
            forward_step_func=forward, data_iterator=iter(share), model=[model], num_microbatches=len(share),
            seq_length=SEQ, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        for group in optimizer.param_groups:  # what its scheduler does
            group["weight_decay"] = args.weight_decay * group["wd_mult"]
            group["lr"] = args.lr - (args.lr - args.min_lr) * number / STEPS
        optimizer.step()
        mean = torch.tensor([sum(float(x["loss"]) for x in out) / len(out) if out else 0.0])
        dist.all_reduce(mean)
        losses.append(float(mean) / (dist.get_world_size() if case.pp == 1 else 1))

    for number in range(SAVED_AT):
        step(number)
    args.iteration, args.consumed_train_samples = SAVED_AT, SAVED_AT * BATCH
    save(folder, case, args, bare, optimizer)
    logits = logits_of(bare) if case.pp == 1 else None
    state = state_of(bare, optimizer, case)
    for number in range(SAVED_AT, STEPS):
        step(number)
    ps.destroy_model_parallel()
    return {"losses": losses, "logits": logits, "state": state}


def state_of(model: Any, optimizer: Any, case: Case) -> dict[str, dict[str, Any]]:
    """This rank's fp32 weights and moments, by kind and by the name of the parameter."""
    found: dict[str, dict[str, Any]] = {"model": {}, "exp_avg": {}, "exp_avg_sq": {}}
    inner = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    flat = inner.get_parameter_state_dp_zero(return_on_all_ranks=True) if case.sharding else None
    for name, parameter in model.named_parameters():
        if flat is not None:
            start, stop, _ = inner.buffers[0].param_index_map[parameter]
            (buffer,) = flat[0].values()
            tensors = {kind: buffer[kind][start:stop].view(parameter.shape) for kind in ("param", *MOMENTS)}
            tensors["model"] = tensors.pop("param")
        else:
            master = parameter.main_param if case.bf16 else parameter
            tensors = {"model": master.data, **inner.optimizer.state[master]}
        for kind in found:
            found[kind][name] = tensors[kind].detach().numpy().copy()
    return found


@torch.no_grad()
def logits_of(model: Any) -> Any:
    from megatron.core import parallel_state as ps

    out = model(probe(), torch.arange(SEQ)[None].expand(BATCH, SEQ), None).contiguous().float()
    parts = [torch.empty_like(out) for _ in range(ps.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, out, ps.get_tensor_model_parallel_group())
    return torch.cat(parts, -1).numpy()


def save(folder: Path, case: Case, args: argparse.Namespace, model: Any, optimizer: Any) -> None:
    """As Megatron-LM's save_checkpoint does, in both its formats."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **case.metadata}
    if case.sharding:
        metadata |= {
            "distrib_optim_sharding_type": case.sharding, "distrib_optim_fully_reshardable_mem_efficient": True
        }  # fmt: skip
    weights = model.sharded_state_dict(metadata=metadata)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": args.iteration}
    sharded = common | {
        "model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "opt_param_scheduler": {"max_lr": args.lr, "num_steps": args.consumed_train_samples},
        "content_metadata": metadata,
    }  # fmt: skip
    target = folder / "iter_0000002"
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded, str(target))
    old = folder.with_name(folder.name + "-old")
    stage = f"_{ps.get_pipeline_model_parallel_rank():03d}" if case.pp > 1 else ""
    rank = old / "iter_0000002" / f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}{stage}"
    if ps.get_data_parallel_rank() == 0:
        rank.mkdir(parents=True)
        state = common | {"model": model.state_dict_for_save_checkpoint(), "rng_state": [{"np": np.random.get_state()}]}
        if case.sharding is None:
            state["optimizer"] = optimizer.state_dict()
        torch.save(state, rank / "model_optim_rng.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        for root in (folder, old):
            (root / "latest_checkpointed_iteration.txt").write_text(str(args.iteration))
