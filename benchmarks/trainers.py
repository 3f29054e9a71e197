"""Training steps of megasp and of its peers on the same work: each `make_*` builds a trainer in the calling process and
returns `step(index) -> loss`, the mean loss of the batch of that number before the weights move.

A step is all that a run does for a batch: forward, backward, reduction, clipping, AdamW on fp32 weights
(matrices decay, norms do not). bf16 means bf16 matrix products with fp32 master weights, in each framework's own way:
bf16 weights beside fp32 masters (megasp, megatron-core), or fp32 weights under autocast (transformers).
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import workload
from megasp import parallel_state
from megasp.checkpoints.hf_names import stack
from megasp.config.hf_config import family_of, write
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.data import Batch
from megasp.training.build import Training, build
from megasp.training.step import train_step

Step = Callable[[int], float]
Source = Callable[[Config, int], Batch]


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def make_megasp(
    config: Config,
    dtype: str,
    lr: float = workload.LEARNING_RATE,
    source: Source = workload.batch,
    device: str = "cpu",
    kernel: str = "auto",
    compile: bool = False,
    **activations: Any,
) -> Step:
    """megasp as `pretrain` runs it; tensor parallel over all ranks, with sequence parallelism.

    Args:
        source: function (config, step) -> batch.
        kernel: attention kernel.
        compile: as --compile.
        activations: fields of `ActivationConfig`.
    """
    ranks = dist.get_world_size()
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1),
        training=dataclasses.replace(config.training, bf16=dtype == "bf16", attention_backend=kernel),
        kernels=dataclasses.replace(config.kernels, compile=compile),
        activations=dataclasses.replace(config.activations, **activations),
    )
    training = build_megasp(config, Layout(tp=ranks), device)
    return lambda index: train_step(training, [source(config, index)], lr).loss


def build_megasp(config: Config, layout: Layout, device: str = "cpu") -> Training:
    """megasp's training on this rank, with the reference weights."""
    assert validate(config, layout.world_size, device) == layout
    training = build(config, parallel_state.build(layout, torch.device(device)))
    workload.load_weights(training)
    return training


def microbatches(config: Config, step: int) -> list[Batch]:
    """The microbatches of one step: each is one of the workload's batches."""
    count = config.num_microbatches(Layout())
    return [workload.batch(config, step * count + index) for index in range(count)]


def make_megasp_pipeline(config: Config, lr: float = workload.LEARNING_RATE) -> Step:
    """megasp over pipeline ranks, by the schedule of the configuration; fp32."""
    training = build_megasp(config, Layout(pp=dist.get_world_size()))
    return lambda index: train_step(training, microbatches(config, index), lr).loss


def make_transformers(
    config: Config,
    dtype: str,
    lr: float = workload.LEARNING_RATE,
    source: Source = workload.batch,
    device: str = "cpu",
) -> Step:
    """transformers' LlamaForCausalLM with PyTorch's attention and fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    family, described = family_of(config.model, config.training.seq_length)
    options = write(family, described, config.training.seq_length)
    model = LlamaForCausalLM(LlamaConfig(**options | {"use_cache": False, "attn_implementation": "sdpa"}))
    weights = workload.weights(config.model)
    stacked = stack(family, {name: tuple(value.shape) for name, value in weights.items()})
    model.load_state_dict({each.key: torch.cat([weights[name] for name, _ in each.parts]) for each in stacked})
    model.to(device).train()  # type: ignore[arg-type]
    parameters, settings = list(model.parameters()), config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step(index: int) -> float:
        batch = source(config, index)
        tokens, labels = (torch.from_numpy(x).to(device) for x in (batch.tokens, batch.labels))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            # shift_labels: these labels are the next tokens already.
            loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def make_megatron(
    config: Config, dtype: str, sdpa: bool, lr: float = workload.LEARNING_RATE, pipeline: bool = False
) -> Step:
    """megatron-core's GPTModel, schedule, gradient buffers and optimizer; tensor parallel over all ranks with
    sequence parallelism, or its 1F1B pipeline over them.

    Args:
        sdpa: put PyTorch's attention in place of its unfused one (without CUDA it has no other).
    """
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    _let_megatron_run_without_cuda()
    from megatron.core import parallel_state as megatron_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    ranks = dist.get_world_size()
    megatron_state.initialize_model_parallel(*((1, ranks) if pipeline else (ranks, 1)))
    half, settings, shape = dtype == "bf16", config.optimizer, config.training
    transformer, gpt = _megatron_model(config, torch.bfloat16 if half else torch.float32, sdpa, pipeline)
    model = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        Float16Module(transformer, gpt) if half else gpt,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=half,
        ),
        [model],
    )
    for group in optimizer.param_groups:  # its scheduler does so in every step
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    transformer.finalize_model_grads_func = finalize_model_grads
    forward_backward = get_forward_backward_func()
    positions = torch.arange(shape.seq_length).repeat(shape.micro_batch_size, 1)

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}  # a copy, since the schedule divides its own in place

    def forward(batches: Any, model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        tokens, labels = next(batches)
        return model(tokens, positions, None, labels=labels), mean

    def step(index: int) -> float:
        batches = microbatches(config, index)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = forward_backward(
            forward_step_func=forward,
            data_iterator=iter([(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches]),
            model=[model],
            num_microbatches=len(batches),
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            forward_only=False,
        )
        done, *_ = optimizer.step()
        assert done
        # Only its last stage knows the loss; rank 0's answer is what the contest compares.
        loss = torch.tensor(sum(float(part["loss"]) for part in found) / len(batches))
        if pipeline:
            dist.broadcast(loss, ranks - 1)
        return float(loss)

    return step


def _let_megatron_run_without_cuda() -> None:
    """megatron-core 0.16 takes CUDA for granted in a few places; call this before it is imported."""
    cuda: Any = torch.cuda
    # Buffers are made on the current device, and the device is waited for.
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None

    # Schedules, optimizer and clipping make tensors with device="cuda".
    def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return made

    for name in ("empty", "ones", "tensor", "zeros"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    # Optimizer and clipping compare the type's name with torch.cuda.FloatTensor.
    plain = torch.Tensor.type

    def type_name(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    # Dropout (here 0) runs under a random state of the device.
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda *args, **kwargs: contextlib.nullcontext()


class _RMSNorm(nn.RMSNorm):
    """Its own norm without Transformer Engine refuses sequence parallelism. This one marks its weight, so that its
    gradient is summed over the tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _SDPA(nn.Module):
    """PyTorch's fused causal attention in the place of megatron-core's DotProductAttention."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [S, B, heads, H] -> [B, heads, S, H]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _megatron_model(config: Config, dtype: torch.dtype, sdpa: bool, pipeline: bool) -> tuple[Any, nn.Module]:
    """megatron-core's configuration and this rank's model, with the reference weights."""
    from megatron.core import parallel_state as megatron_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    model = config.model
    ranks, stages = megatron_state.get_tensor_model_parallel_world_size(), dist.get_world_size() if pipeline else 1
    transformer = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.mlp_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=True,  # it also marks split weights: without it the gradient norm is silently wrong
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=stages,
        sequence_parallel=ranks > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        # torch.compile'd fusions want a C++ compiler; without one they fail.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _RMSNorm
    if sdpa:
        layer.submodules.self_attention.submodules.core_attention = _SDPA
    gpt = GPTModel(
        transformer,
        TransformerBlockSubmodules([layer] * (model.num_layers // stages), layer_norm=_RMSNorm),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=config.training.seq_length,
        pre_process=megatron_state.is_pipeline_first_stage(),
        post_process=megatron_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        share_embeddings_and_output_weights=False,
    )
    _load_megatron(gpt, config, ranks, megatron_state.get_tensor_model_parallel_rank())
    return transformer, gpt


@torch.no_grad()
def _load_megatron(gpt: Any, config: Config, ranks: int, rank: int) -> None:
    """Copy this rank's part of the reference weights; q, k and v lie together by kv head, gate and up by rank."""
    model = config.model
    values = workload.weights(model)

    def part(name: str, dim: int = 0) -> Tensor:
        return values[f"{name}.weight"].chunk(ranks, dim)[rank]

    if gpt.pre_process:
        gpt.embedding.word_embeddings.weight.copy_(part("embedding"))
    if gpt.post_process:
        gpt.decoder.final_layernorm.weight.copy_(values["final_norm.weight"])
        gpt.output_layer.weight.copy_(part("head"))
    for layer in gpt.decoder.layers:
        name = f"layers.{layer.layer_number - 1}"
        by_group = [part(f"{name}.attention.{x}").unflatten(0, (model.kv_heads // ranks, -1)) for x in "qkv"]
        layer.self_attention.linear_qkv.weight.copy_(torch.cat(by_group, 1).flatten(0, 1))
        layer.self_attention.linear_proj.weight.copy_(part(f"{name}.attention.o", 1))
        layer.mlp.linear_fc1.weight.copy_(torch.cat([part(f"{name}.mlp.gate"), part(f"{name}.mlp.up")]))
        layer.mlp.linear_fc2.weight.copy_(part(f"{name}.mlp.down", 1))
        layer.input_layernorm.weight.copy_(values[f"{name}.input_norm.weight"])
        layer.pre_mlp_layernorm.weight.copy_(values[f"{name}.mlp_norm.weight"])
