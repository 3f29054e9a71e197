"""The sharding collator: padding, shifted labels, documents, and which tokens a rank holds."""

from typing import Any

import numpy as np
import pytest
import torch

from megasp.errors import ConfigError
from megasp.huggingface.batches import IGNORED, ShardingCollator, document_starts


def shards(features: Any, ulysses: int, ring: int, **options: Any) -> list[dict[str, Any]]:
    return [ShardingCollator(ulysses, ring, rank, **options)(features) for rank in range(ulysses * ring)]


def test_the_picture_of_the_module() -> None:
    sample = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "position_ids": [0, 1, 2, 3, 0, 1, 2]}
    sample["labels"] = [IGNORED, 2, 3, 4, IGNORED, 6, 7]
    first, second = shards([sample], 1, 2, pad_token_id=9)
    assert first["input_ids"].tolist() == [[1, 2, 7, 9]]
    assert second["input_ids"].tolist() == [[3, 4, 5, 6]]
    assert first["shift_labels"].tolist() == [[2, 3, IGNORED, IGNORED]]
    assert second["shift_labels"].tolist() == [[4, IGNORED, 6, 7]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 0]]
    for batch in (first, second):
        assert "attention_mask" not in batch
        (starts,) = batch["sample_info"].documents
        assert starts.tolist() == [0, 4, 7]
    assert first["sample_info"].fingerprint == second["sample_info"].fingerprint
    other, _ = shards([sample | {"labels": [IGNORED, 2, 3, 4, IGNORED, 6, IGNORED]}], 1, 2, pad_token_id=9)
    assert other["sample_info"].fingerprint != first["sample_info"].fingerprint, "targets count, too"


def test_samples_of_different_lengths() -> None:
    """They are padded to the longest, then to what the ranks divide; labels are the tokens; padding is not counted."""
    batches = shards([{"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([4, 5, 6, 7, 8])}], 3, 1)
    whole = {name: torch.cat([batch[name] for batch in batches], 1) for name in ("input_ids", "labels", "shift_labels")}
    assert whole["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 0]]
    assert whole["shift_labels"].tolist() == [[2, 3] + 4 * [IGNORED], [5, 6, 7, 8, IGNORED, IGNORED]]
    assert [starts.tolist() for starts in batches[0]["sample_info"].documents] == [[0, 3], [0, 5]]


def test_one_document_needs_no_list() -> None:
    (batch,) = shards([{"input_ids": list(range(8))}], 1, 1)
    assert batch["sample_info"].documents is None


def test_padding_in_front() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    (starts,) = document_starts(torch.arange(5)[None], mask) or ()
    assert starts.tolist() == [0, 2]


def test_a_collator_of_ones_own() -> None:
    """transformers' packing collator; what it adds for other kernels is dropped."""
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    first, second = shards([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], 2, 1, collate=collate)
    assert first["input_ids"].tolist() == [[1, 2, 3]]
    assert second["shift_labels"].tolist() == [[5, IGNORED, IGNORED]]
    np.testing.assert_array_equal(first["sample_info"].documents[0], [0, 3, 5])
    assert set(first) == {"input_ids", "labels", "shift_labels", "position_ids", "sample_info"}


TOKENS = torch.arange(8)[None]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"input_ids": TOKENS[:, :6]}, "a batch of 6 tokens a sample for 4 ranks of a sequence"),
    "no tokens": ({"labels": TOKENS}, "it needs input_ids"),
    "4D mask": (
        {"input_ids": TOKENS, "attention_mask": torch.ones(1, 1, 8, 8)},
        "attention_mask of shape (1, 1, 8, 8)",
    ),
    "image": ({"input_ids": TOKENS, "pixel_values": torch.ones(1, 3, 4, 4)}, "pixel_values of shape (1, 3, 4, 4)"),
    "hole": (
        {"input_ids": TOKENS, "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])},
        "an attention_mask that hides tokens inside a document",
    ),
    "numbered documents": (
        {"input_ids": TOKENS, "attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])},
        "say packed documents by position_ids that restart",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_batch_that_cannot_be_cut_is_one_sentence(name: str) -> None:
    batch, said = BAD[name]
    with pytest.raises(ConfigError) as refusal:
        ShardingCollator(2, 2, 0).shard(batch)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_samples_without_tokens() -> None:
    with pytest.raises(ConfigError, match="tokenize the dataset"):
        ShardingCollator(2, 2, 0)([{"text": "a"}])
