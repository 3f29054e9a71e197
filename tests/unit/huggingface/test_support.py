"""What cannot be served is refused in one sentence, before or at the first call; nothing is left out unsaid."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from megasp.config.layout import Layout
from megasp.errors import ConfigError
from megasp.huggingface import sequence_parallel
from megasp.parallel_state import Axis, ParallelState
from tests.parity.test_huggingface import VOCAB, model_of

SINGLE = ParallelState.single()


def state_of(**sizes: int) -> ParallelState:
    """A state whose axes have these sizes, without groups."""
    axes = SINGLE.axes | {name: Axis(name, size) for name, size in sizes.items()}
    return replace(SINGLE, layout=Layout(**sizes), axes=axes)


def refusal(model: Any, state: ParallelState = SINGLE, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        sequence_parallel(model, state, **options)
    return str(raised.value)


def small(name: str, **changes: Any) -> nn.Module:
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**changes))


def bloom() -> nn.Module:
    return small("Bloom", vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)


def gpt2(**changes: Any) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, **changes)
    return transformers.GPT2LMHeadModel(config)


def mamba() -> nn.Module:
    return small("Mamba", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[Any, str]] = {
    "not a model": (lambda: nn.Linear(2, 2), "it must be a transformers model"),
    "attention of its own": (bloom, "BloomForCausalLM: its attention cannot be swapped"),
    "state space": (mamba, "Mamba"),
    "soft-capping": (lambda: model_of("Gemma2", attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
    "attention dropout": (lambda: model_of("Llama", attention_dropout=0.1), "attention_dropout=0.0"),
    "attn_pdrop": (gpt2, "attention dropout 0.1"),
    "router's loss": (lambda: mixtral(output_router_logits=True), "with output_router_logits"),
    "prefix": (lambda: model_of("Llama", prefix_lm=True), "with prefix_lm"),
    "longrope": (lambda: model_of("Llama", rope_parameters=LONGROPE), "rotary type longrope"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_that_cannot_be_served(name: str) -> None:
    make, said = MODELS[name]
    assert said in refusal(make())


OPTIONS: dict[str, tuple[ParallelState, dict[str, Any], str]] = {
    "heads": (state_of(ulysses=8), {}, "4 attention heads on 8 Ulysses ranks"),
    "tensor parallel": (
        state_of(tp=2),
        {},
        "layout tp2-pp1-u1-r1-dp1: transformers models are split by",
    ),
    "flash_attention_2": (SINGLE, {"attention": "flash_attention_2"}, "attention 'flash_attention_2': "),
    "unknown kernel": (SINGLE, {"attention": "xformers"}, "attention 'xformers': it is one of flash_attention_2"),
    "ring mode": (SINGLE, {"ring_mode": "a2a"}, "ring_mode 'a2a': it is one of p2p"),
    "offload": (SINGLE, {"activation_offload": True}, "activation_offload on a CPU"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_that_cannot_be_served(name: str) -> None:
    state, options, said = OPTIONS[name]
    assert said in refusal(model_of("Llama"), state, **options)


def test_flash_attention_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the reason is the missing package; a model loaded with it asks for it, too."""
    cuda = replace(SINGLE, device=torch.device("cuda", 0))
    assert "not installed here (module flash_attn)" in refusal(model_of("Llama"), cuda, attention="flash_attention_2")
    model = model_of("Llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "attention 'flash_attention_2'" in refusal(model)


def test_twice() -> None:
    model, _ = sequence_parallel(model_of("Llama"), SINGLE)
    assert "called twice" in refusal(model)


def test_head_that_chunked_loss_cannot_compute() -> None:
    assert "an output head that is Linear with a bias" in refusal(small_phi(), chunked_loss=True)


def small_phi() -> nn.Module:
    return small(
        "Phi", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )


def mixtral(**changes: Any) -> nn.Module:
    return small(
        "Mixtral", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, **changes,
    )  # fmt: skip


def test_experts_are_not_tiled() -> None:
    experts = mixtral()
    assert "MixtralForCausalLM (num_local_experts 2)" in refusal(experts, tiled_mlp=True)


def batch_of(collate: Any) -> dict[str, Any]:
    return collate([{"input_ids": list(range(1, 9))}])


CALLS: dict[str, tuple[Any, str]] = {
    "whole batch": (lambda batch: {"input_ids": batch["input_ids"]}, "a batch without positions"),
    "mask": (lambda batch: batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, "beside a shard"),
    "cache": (lambda batch: batch | {"past_key_values": transformers.DynamicCache()}, "past_key_values"),
    "loss elsewhere": (lambda batch: batch | {"labels": None}, "label smoothing, compute_loss_func"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_that_shards_cannot_serve(name: str) -> None:
    change, said = CALLS[name]
    model, collate = sequence_parallel(model_of("Llama"), SINGLE)
    with pytest.raises(ConfigError, match=said):
        model(**change(batch_of(collate)))


def test_window_that_a_layer_does_not_pass_on() -> None:
    model = small(
        "Qwen2Moe", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=2,
        shared_expert_intermediate_size=8, num_experts_per_tok=1, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"],
    )  # fmt: skip
    model, collate = sequence_parallel(model, SINGLE)
    with pytest.raises(ConfigError, match="a window that it keeps to itself"):
        model(**batch_of(collate))


def test_logits_changed_after_the_head() -> None:
    model, collate = sequence_parallel(model_of("Gemma2", final_logit_softcapping=30.0), SINGLE, chunked_loss=True)
    with pytest.raises(ConfigError, match="changes its logits after the head"):
        model(**batch_of(collate))


def test_loss_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not call the loss function that it was given shifts labels across shards."""
    model, collate = sequence_parallel(model_of("Llama"), SINGLE)
    monkeypatch.setattr(model, "_loss_function", lambda logits, **_: logits.sum())
    with pytest.raises(ConfigError, match="whose loss is its own"):
        model(**batch_of(collate))


def test_offload_without_checkpointing() -> None:
    from megasp.huggingface.memory import Offload

    model = model_of("Llama")
    Offload(model)
    with pytest.raises(ConfigError, match="gradient_checkpointing_enable"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_offload_moves_the_inputs_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed has the width of the residual stream: nothing inside a layer, no weight matrix."""
    from megasp.huggingface.memory import Offload

    model = model_of("Llama")
    model.gradient_checkpointing_enable()
    Offload(model)
    packed: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def pack(x: Tensor) -> Tensor:
        packed.append(tuple(x.shape))
        return x

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda pin_memory: hooks(pack, lambda x: x))
    model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False).logits.sum().backward()
    layers = model.config.num_hidden_layers
    assert packed.count((1, 4, 48)) >= layers
    assert {shape for shape in packed if len(shape) == 2 and 48 in shape} == set()


def test_parameters_and_their_names_stay() -> None:
    model = model_of("Llama")
    before = list(model.state_dict())
    sequence_parallel(model, SINGLE, tiled_mlp=True, chunked_loss=True)
    assert list(model.state_dict()) == before


def test_without_targets_there_are_logits() -> None:
    model, collate = sequence_parallel(model_of("Llama"), SINGLE, chunked_loss=True)
    batch = batch_of(collate)
    del batch["labels"], batch["shift_labels"]
    output = model.eval()(**batch)
    assert output.logits.shape == (1, 8, VOCAB)
    assert "logits" not in model(**batch_of(collate))
