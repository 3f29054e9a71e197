"""transformers models whose sequences are split over gloo ranks against the same models on whole samples, fp32."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.parallel_state import ParallelState
from tests.ranks import run_ranks

TOLERANCE = 2e-5
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    "Qwen3": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 4, "attn_logit_softcapping": None, "query_pre_attn_scalar": 7},
}
SAVERS = {"tiled_mlp": 3, "chunked_loss": True}


def model_of(name: str, **changes: Any) -> nn.Module:
    """A small model, the same on every rank."""
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name] | changes)
    torch.manual_seed(1)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.train()


def whole_batch(kind: str, groups: int) -> dict[str, Tensor]:
    """Samples of all data ranks, two each. Packed: documents by position_ids. Padded: a mask, and a shard without a
    target (the labels of the first half of a sample are not counted)."""
    generator = torch.Generator().manual_seed(7)
    rows, length = 2 * groups, 24
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[0, :13] = -100
    if kind == "packed":
        starts = [[0, 1, 7, 12], [0, 23], [0], [0, 11, 13]]
        positions = torch.stack([_restarting(starts[row % 4], length) for row in range(rows)])
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}
    mask = torch.ones_like(tokens)
    for row in range(rows):
        mask[row, length - 3 * row :] = 0
    mask[0] = 1
    return {"input_ids": tokens, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def _restarting(starts: list[int], length: int) -> Tensor:
    positions = np.arange(length)
    return torch.as_tensor(positions - np.array(starts)[np.searchsorted(starts, positions, "right") - 1])


def difference(state: ParallelState, name: str, kind: str, changes: dict[str, Any], **options: Any) -> dict[str, float]:
    """Largest relative errors of this rank's logits, of the loss and of the gradients."""
    from megasp.huggingface import sequence_parallel

    whole = whole_batch(kind, state.dp.size)
    checkpoint = changes.pop("checkpoint", False)
    model = model_of(name, **changes)
    reference = copy.deepcopy(model)
    count = (whole["labels"][:, 1:] != -100).sum()
    want = reference(**whole, num_items_in_batch=count, use_cache=False)  # a cache would join packed documents
    want.loss.backward()
    if checkpoint:
        model.gradient_checkpointing_enable()
    model, collate = sequence_parallel(model, state, **options)
    rows = slice(2 * state.dp.rank, 2 * state.dp.rank + 2)
    batch = collate([{key: x[row] for key, x in whole.items()} for row in range(rows.start, rows.stop)])
    got = model(**batch)
    got.loss.backward()
    found = {}
    if not options.get("chunked_loss"):
        from megasp.huggingface.batches import shard_map

        cp = state.cp
        here = torch.as_tensor(shard_map(24, state.ulysses.size, state.ring.size, collate.ring_mode).positions(cp.rank))
        shown = whole.get("attention_mask", torch.ones_like(whole["input_ids"]))[rows][:, here, None]
        found["logits"] = error(got.logits * shown, want.logits[rows][:, here] * shown)
    loss = got.loss.detach().clone()
    dist.all_reduce(loss)
    found["loss"] = error(loss / dist.get_world_size(), want.loss)
    for (key, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        found[key] = error(mine.grad / dist.get_world_size(), theirs.grad)
    return found


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-3)).item()


Case = tuple[str, str, str, dict[str, Any], dict[str, Any]]
"""Model, batch, layout, changes of the model's config, options."""

CASES: dict[int, list[Case]] = {
    2: [
        ("Llama", "packed", "u2", {}, {}),
        ("Qwen3", "padded", "r2", {}, SAVERS),
    ],
    4: [
        ("Llama", "packed", "u2-r2", {}, SAVERS),
        ("Llama", "padded", "r4", {"attention_bias": True}, {"ring_mode": "lightseq"}),
        ("Llama", "padded", "u2-dp2", {}, {"chunked_loss": True}),
        ("Qwen2", "packed", "u4", {}, {}),
        ("Qwen3", "packed", "r2-dp2", {"checkpoint": True}, {"ring_mode": "all_gather"}),
        ("Mistral", "packed", "u2-r2", {}, {"tiled_mlp": 3}),
        ("Gemma2", "packed", "u2-r2", {}, {}),
        ("Gemma2", "padded", "u4", {}, {"tiled_mlp": True, "attention": "eager"}),
    ],
    8: [
        ("Mistral", "packed", "u4-r2", {}, {}),
        ("Llama", "padded", "r8", {}, SAVERS),
        ("Qwen2", "packed", "u2-r2-dp2", {"checkpoint": True}, {}),
    ],
}


def differences(cases: list[Case]) -> list[dict[str, float]]:
    states: dict[str, ParallelState] = {}
    for _, _, layout, _, _ in cases:
        if layout not in states:
            states[layout] = parallel_state.build(Layout.parse(layout), torch.device("cpu"))
    return [
        difference(states[layout], name, kind, changes, **options) for name, kind, layout, changes, options in cases
    ]


@pytest.mark.parametrize("world_size", CASES)
def test_model_over_split_sequences(world_size: int) -> None:
    """Logits of each rank's tokens, the loss, and every gradient."""
    by_rank = run_ranks(differences, world_size, CASES[world_size])
    for case, of_ranks in zip(CASES[world_size], zip(*by_rank, strict=True), strict=True):
        worst = {name: max(found[name] for found in of_ranks) for name in of_ranks[0]}
        bad = {name: error for name, error in worst.items() if not error < TOLERANCE}
        assert not bad, (case, bad)
