"""megasp's attention in transformers' registry: every model that looks its attention up there calls it by name.

The registered function knows no ranks. What does comes with each batch, as the keyword `sample_attention`, which
transformers passes through the model to every layer. So two models, two rank grids, or a layer that is recomputed in
the backward (gradient checkpointing) never see each other's batch.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from megasp.errors import ConfigError
from megasp.huggingface.batches import SampleInfo, shard_map
from megasp.huggingface.precision import cast
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import Mask, SequenceAttention, Work

NAME = "megasp"
"""Of the attention implementation."""

UNSERVED = ("softcap", "s_aux", "position_bias", "head_mask", "indices")
"""Keywords of transformers' attention functions that change the result and that no kernel here has."""


class SplitAttention:
    """Attention over samples of any length, each with any window: what all layers and batches of a model share."""

    def __init__(self, state: ParallelState, backend: str, ring_mode: str) -> None:
        self.state, self.backend, self.ring_mode = state, backend, ring_mode
        self.of = lru_cache(maxsize=32)(self._of)

    def _of(self, length: int, window: int | None) -> SequenceAttention:
        shards = shard_map(length, self.state.ulysses.size, self.state.ring.size, self.ring_mode)
        return SequenceAttention(self.state, shards, self.backend, self.ring_mode, Mask(window))


class SampleAttention:
    """Attention of one batch; its layers share the plan of each window (`Work`).

    Attributes:
        called: whether any layer did.
    """

    def __init__(self, attention: SplitAttention, samples: SampleInfo) -> None:
        self.attention, self.samples, self.called = attention, samples, False
        self._work: dict[tuple[int | None, int, int], Work] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
        """q [S, B, N, H], k and v [S, B, G, H], this rank's shards -> [S, B, N, H]."""
        self.called = True
        attention = self.attention.of(self.samples.length, window)
        key = window, q.shape[2], k.shape[2]
        if key not in self._work:
            self._work[key] = attention.work(len(q), q.shape[2], k.shape[2], self.samples.documents)
        return attention(q, k, v, self._work[key], scale=scale)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    sample_attention: SampleAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of this rank's queries to the keys of all ranks that share the sequence.

    Args:
        query: [B, N, S, H].
        key, value: [B, G, S, H].
        sliding_window: keys that a query sees, itself included.
        sample_attention: what `sequence_parallel` hung around the model puts into each call.
    Returns:
        [B, S, N, H], and no probabilities.
    """
    if sample_attention is None:
        raise ConfigError(
            f"{type(module).__name__} without positions",
            "the model must pass the keywords of its call on to its attention",
            "call the model that sequence_parallel returned, with a batch of its collator",
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = {name: options[name] for name in UNSERVED if options.get(name) is not None}
    asked |= {"dropout": dropout} if dropout else {}
    asked |= {} if causal else {"is_causal": False}
    asked |= {"a window that it keeps to itself": ""} if sliding_window is None and _slides(module) else {}
    asked |= {} if query.shape[-1] == value.shape[-1] else {"value heads of size": value.shape[-1]}
    asked |= {} if attention_mask is None else {"attention_mask": tuple(attention_mask.shape)}
    if asked:
        name, given = next(iter(asked.items()))
        raise ConfigError(
            f"{type(module).__name__} with {name} {given if isinstance(given, int | float | tuple) else ''}".rstrip(),
            "no attention kernel over a split sequence has it",
            "use another model, or switch it off in the model's config",
        )
    if key.shape[2] != query.shape[2]:
        raise ConfigError(
            f"{query.shape[2]} queries and {key.shape[2]} keys on a rank",
            "each rank's queries and keys are those of its shard; a cache of earlier keys is not",
            "generate with a model of its own",
        )
    window = None if sliding_window is None else sliding_window - 1  # keys before the query
    with cast(query, key, value) as qkv:  # rotary positions may have made some of them wider
        q, k, v = (x.permute(2, 0, 1, 3) for x in qkv)
        return sample_attention(q, k, v, window, scaling).transpose(0, 1), None


def _slides(module: nn.Module) -> bool:
    """Whether the model's config gives this layer a window: some models say so in their masks alone."""
    config = getattr(module, "config", None)
    kinds: list[str] = getattr(config, "layer_types", None) or []
    if not kinds:
        return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    layer: int | None = getattr(module, "layer_idx", None)
    return layer is not None and kinds[layer : layer + 1] == ["sliding_attention"]


AttentionInterface.register(NAME, attention_forward)
