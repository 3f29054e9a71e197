"""Batches of whole samples -> this rank's shard of them: padded, shifted, cut, with what attention must know.

    position in the sample   0    1    2    3    4    5    6    7
    input_ids                a    b    c    d    x    y    z    .      two packed documents, one token of padding
    position_ids             0    1    2    3    0    1    2    0
    shift_labels             b    c    d    -    y    z    -    -      shifted before the cut (- is not counted)
    documents                0                   4              7
    rank 0 of a ring of 2    a    b                         z    .     zigzag: one part from either end
    rank 1                             c    d    x    y

A document begins where a position is not one more than the position before it, as transformers reads packed samples,
and where padding begins or ends.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megasp.errors import ConfigError
from megasp.parallel_state import ParallelState
from megasp.shard_map import ShardMap

IGNORED = -100
"""The label that is not counted."""

PER_SAMPLE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What transformers' packing collators add for other kernels; `position_ids` say the same."""

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class SampleInfo:
    """What attention must know of whole samples of which this rank holds a shard. A batch carries it as "sample_info".

    Args:
        length: tokens of a sample over all ranks, padding included.
        documents: of each sample the positions at which documents begin, int64, ascending, the first is 0; None where
            each sample is one document.
        fingerprint: of the samples' tokens, positions, targets and padding, so that ranks can see that they hold parts
            of the same.
    """

    length: int
    documents: tuple[np.ndarray, ...] | None
    fingerprint: int


@lru_cache
def shard_map(length: int, ulysses: int, ring: int, ring_mode: str) -> ShardMap:
    """Who holds which of `length` positions; `ulysses * ring` divides it."""
    if ring == 1 or ring_mode == "lightseq":  # which balances contiguous shards by itself
        return ShardMap.contiguous(length, ulysses * ring)
    return ShardMap.zigzag(length, ring, ulysses)


@dataclass(frozen=True)
class ShardingCollator:
    """A data collator whose batches hold this rank's shard of each sample. It communicates nothing, so it may run in a
    loader's worker; every rank of a sequence must be given the same samples (`loaders` sees to it under Accelerate).

        collate(features)       samples as a dataset gives them
        collate.shard(batch)    a batch that was collated already, of a length that the ranks divide

    Args:
        ulysses, ring, rank: sizes of the axes that split a sequence, and this rank among them.
        ring_mode: how the ring's ranks exchange.
        data_ranks, data_rank: ranks that read different samples, and this one among them.
        pad_token_id: token of the padding; it is never a label.
        collate: makes a batch of whole samples from features; pads them at the end to the longest without it.
    """

    ulysses: int
    ring: int
    rank: int
    ring_mode: str = "p2p"
    data_ranks: int = 1
    data_rank: int = 0
    pad_token_id: int = 0
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, state: ParallelState, ring_mode: str, pad_token_id: int, collate: Any) -> "ShardingCollator":
        """The collator of this rank."""
        ulysses, ring, dp = state.ulysses.size, state.ring.size, state.dp
        return cls(ulysses, ring, state.cp.rank, ring_mode, dp.size, dp.rank, pad_token_id, collate)

    @property
    def ranks(self) -> int:
        """Ranks that share a sequence."""
        return self.ulysses * self.ring

    def __call__(self, features: list[Any]) -> Batch:
        """Collate, pad to a length that the ranks divide, and shard."""
        batch = dict(self.collate(features)) if self.collate is not None else self._stack(features)
        batch = {name: torch.as_tensor(x) if isinstance(x, np.ndarray | list) else x for name, x in batch.items()}
        _check(batch)
        length = batch["input_ids"].shape[1]
        return self.shard(self._padded(batch, -length % self.ranks))

    def shard(self, batch: Mapping[str, Any]) -> Batch:
        """This rank's shard of a batch of whole samples.

        Args:
            batch: `input_ids` [B, S], and where given `position_ids` (restarting with each packed document; 0 to S - 1
                without them), `labels` (unshifted) or `shift_labels`, a padding mask `attention_mask`, and further
                tensors [B, S, ...], each of which is cut likewise.
        Returns:
            The same with S / ranks positions; `shift_labels`; "sample_info"; no `attention_mask`, which it replaces.
        Raises:
            ConfigError: the batch cannot be cut.
        """
        _check(batch)
        batch = {name: x for name, x in batch.items() if name not in PER_SAMPLE}
        tokens: Tensor = batch["input_ids"]
        rows, length = tokens.shape
        if length % self.ranks:
            raise ConfigError(
                f"a batch of {length} tokens a sample for {self.ranks} ranks of a sequence",
                "its ranks hold equally many tokens each",
                f"pad it to {length + -length % self.ranks}, as the collator itself does",
            )
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(length)[None]
        batch["position_ids"] = positions = positions.expand(rows, length)
        if "labels" in batch and batch.get("shift_labels") is None:
            batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        mask = batch.pop("attention_mask", None)
        documents = document_starts(positions, mask)
        same = _fingerprint(tokens, positions, batch.get("shift_labels"), mask)
        shards = shard_map(length, self.ulysses, self.ring, self.ring_mode)
        here = torch.as_tensor(shards.positions(self.rank), device=tokens.device)
        local = {name: x.index_select(1, here) if isinstance(x, Tensor) else x for name, x in batch.items()}
        return local | {"sample_info": SampleInfo(length, documents, same)}

    def _stack(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Features of different lengths, padded at their ends; the labels are the tokens where none are given."""
        names = [name for name in ("input_ids", "labels", "shift_labels", "position_ids") if name in features[0]]
        if "input_ids" not in names:
            raise ConfigError(
                f"samples of {', '.join(features[0]) or 'nothing'}", "they need input_ids", "tokenize the dataset"
            )
        longest = max(len(feature["input_ids"]) for feature in features)
        batch: Batch = {name: [] for name in (*names, "attention_mask")}
        for feature in features:
            given = {name: torch.as_tensor(feature[name]) for name in names}
            mask = feature.get("attention_mask")
            given["attention_mask"] = torch.as_tensor(mask) if mask is not None else torch.ones_like(given["input_ids"])
            room = longest - len(given["input_ids"])
            for name, x in given.items():
                batch[name].append(F.pad(x, (0, room), value=self._padding(name)))
        batch = {name: torch.stack(rows) for name, rows in batch.items()}
        if not {"labels", "shift_labels"} & set(names):
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch

    def _padded(self, batch: Batch, room: int) -> Batch:
        """A batch with `room` tokens of padding at the end of each sample."""
        if room == 0:
            return batch
        if "attention_mask" not in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return {
            name: F.pad(x, (0, 0) * (x.dim() - 2) + (0, room), value=self._padding(name))
            if isinstance(x, Tensor) and name not in PER_SAMPLE
            else x
            for name, x in batch.items()
        }

    def _padding(self, name: str) -> int:
        return {"input_ids": self.pad_token_id, "labels": IGNORED, "shift_labels": IGNORED}.get(name, 0)


def _check(batch: Mapping[str, Any]) -> None:
    """Every tensor is [B, S, ...]."""
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise ConfigError(
            f"a batch of {', '.join(batch)}", "it needs input_ids [batch, sequence]", "let a collator make it"
        )
    for name, x in batch.items():
        if name in PER_SAMPLE or not isinstance(x, Tensor):
            continue
        fits = x.shape[1:2] == tokens.shape[1:] and (len(x) == len(tokens) or name == "position_ids")
        if not fits or (name == "attention_mask" and x.dim() != 2):
            raise ConfigError(
                f"{name} of shape {tuple(x.shape)} in a batch of {tuple(tokens.shape)} tokens",
                "a sample's tensors are cut along its tokens, and a mask is one number a token",
                "leave it out; say packed documents by position_ids that restart",
            )


def document_starts(positions: Tensor, mask: Tensor | None) -> tuple[np.ndarray, ...] | None:
    """Where documents and padding begin in each sample; None where each is one document.

    Args:
        positions: [B, S].
        mask: 0 for padding, else 1, [B, S].
    Raises:
        ConfigError: a mask hides tokens inside a document, which would split it.
    """
    begins = np.ones(positions.shape, bool)
    begins[:, 1:] = np.diff(positions.cpu().numpy()) != 1
    if mask is not None:
        shown = mask.cpu().numpy() != 0
        changes = shown[:, 1:] != shown[:, :-1]
        appears = shown.copy()  # first tokens of a document, and tokens that follow padding
        appears[:, 1:] &= begins[:, 1:] | changes
        if np.bincount(begins.cumsum(), appears.ravel()).max() > 1 or not ((mask == 0) | (mask == 1)).all():
            raise ConfigError(
                "an attention_mask that hides tokens inside a document",
                "it may hide padding at either end, by 0 among 1",
                "say packed documents by position_ids that restart",
            )
        begins[:, 1:] |= changes
    if not begins[:, 1:].any():
        return None
    return tuple(np.flatnonzero(row) for row in begins)


def _fingerprint(*tensors: Tensor | None) -> int:
    arrays = (x.cpu().contiguous().numpy() for x in tensors if x is not None)
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))
