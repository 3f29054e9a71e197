"""The GPT: embedding, blocks, norm, head. Reads like a model of one device; the layers know their axes.

Shapes: B batch, S sequence on this rank (after the split over context-parallel ranks), T tensor-parallel ranks,
D hidden size, V vocabulary. The residual stream is [S, B, D], sequence first, so that splitting and gathering a
sequence never moves memory; with sequence parallelism it is [S / T, B, D].
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megasp.collectives import copy_to, gather_from, start_all_gather
from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.host_copies import copier
from megasp.model.attention import Tokens
from megasp.model.block import Block
from megasp.model.dropout import TokenKeys, dropout, site_key
from megasp.model.init import Factory
from megasp.model.kernels import EAGER, Kernels
from megasp.model.layers import VocabParallelEmbedding, lookup, replicated
from megasp.model.loss import linear_cross_entropy
from megasp.model.norm import Norm
from megasp.model.offload import Offload
from megasp.model.products import PLAIN, Products
from megasp.model.recompute import recomputed, shared_out
from megasp.model.rotary import cos_sin
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import Documents, Kept, Mask, SequenceAttention


class GPTModel(nn.Module):
    """A GPT, or some of its layers with or without the ends.

    Args:
        config: the architecture.
        state: the rank grid; one process without it.
        layers: numbers of the layers held; all without it.
        first: whether the embedding is here.
        last: whether the final norm and the head are here. Where the ends are apart, tied embeddings are two copies of
            one canonical tensor, and the training step sums their gradients.
        sequence_parallel: split the residual stream over the tensor-parallel ranks.
        attend: attention over the split sequence; without it over contiguous shards, by the best kernel there is.
        recompute: what is recomputed in the backward, and in which layers.
        tiled_mlp: tiles of the sequence in which each MLP is computed.
        head_bytes: of the logits that exist at a time; 128 MiB without it.
        offloaded_layers: first layers whose activations go to the host.
        kernels: of everything between the products.
        products: layer number -> how its linear layers multiply; in the dtype of the parameters without it.
        factory: device, dtype and seed of the parameters.

    Example:
        config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=1000)
        model = GPTModel(config)
        logits = model(torch.randint(1000, (2, 16)))            # [2, 16, padded vocabulary]
    """

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState | None = None,
        *,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        sequence_parallel: bool = False,
        attend: SequenceAttention | None = None,
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
        tiled_mlp: int = 1,
        head_bytes: int | None = None,
        offloaded_layers: int = 0,
        kernels: Kernels = EAGER,
        products: Callable[[int], Products] = lambda number: PLAIN,
        factory: Factory | None = None,
    ) -> None:
        super().__init__()
        state = state or ParallelState.single()
        factory = factory or Factory(state.device)
        layers = layers if layers is not None else range(config.num_layers)
        self.config, self.state = config, state
        self.sequence_parallel = sequence_parallel and state.tp.size > 1
        self.residual_split = state.tp.size if self.sequence_parallel else 1
        self.attend = attend or SequenceAttention(state, mask=Mask(config.window_size, config.attention_sinks))
        options = self.sequence_parallel, self.attend, factory
        tied = not config.untie_embeddings_and_output_weights
        split = tied and not (first and last)
        self.embedding = self._embedding(factory, "embedding", 0 if split else None) if first else None
        self.position_embedding = None
        if first and config.position_embedding_type == "learned_absolute":
            shape = (config.max_position_embeddings or 1024, config.hidden_size)
            piece = replicated("position_embedding.weight", shape, state.tp, partial=self.sequence_parallel)
            self.position_embedding = factory.parameter([piece.with_facts(init_std=config.init_method_std, decay=True)])
        self.embedding_key = site_key(factory.seed, "embedding")
        self.offloaded_layers, self.head_bytes, self.run = offloaded_layers, head_bytes, kernels.run
        self.copies = copier(state.device if offloaded_layers else torch.device("cpu"))
        self.groups = recompute.groups(len(layers))
        self.recompute = [recompute if again else Recompute() for group, again in self.groups for _ in group]
        self.layers = nn.ModuleList(
            Block(config, state, *options, f"layers.{number}", again, tiled_mlp, products(number), kernels)
            for number, again in zip(layers, self.recompute, strict=True)
        )
        self.final_norm = self.head = None
        if last:
            self.final_norm = Norm(
                config.normalization,
                config.hidden_size,
                config.norm_epsilon,
                state.tp,
                partial=self.sequence_parallel,
                factory=factory,
                name="final_norm",
                tiles=self.attend.sequence_chunks,
                kernel=kernels.norm,
            )
            shared = self.embedding if first else self._embedding(factory, "embedding", 1) if tied else None
            self.head = shared if tied else self._embedding(factory, "head")

    def _embedding(self, factory: Factory, name: str, copy: int | None = None) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            self.config.padded_vocab_size,
            self.config.hidden_size,
            self.state.tp,
            sequence_parallel=self.sequence_parallel,
            init_std=self.config.init_method_std,
            factory=factory,
            name=name,
            copy=copy,
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        document_starts: Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with labels the sum of the token losses.

        Args:
            tokens: ids, int64 [B, S]; or with `first` False the residual stream of the layer before.
            labels: next tokens, int64 [B, S].
            loss_mask: weight of each token's loss, [B, S]; ones without it.
            positions: global positions of this rank's tokens, int64 [S]; 0, 1, ... without it.
            samples: global sample numbers, int64 [B]; with them dropout is on.
            document_starts: of each whole sample, the positions where documents begin, which do not see each other
                then, int64, ascending from 0.
            position_ids: what the position embedding sees, int64 [B, S], where positions restart with each document;
                `positions` without it.
        Returns:
            Logits [B, S, V] of every rank's vocabulary; or, with labels, the masked sum of this rank's token losses, a
            scalar in fp32 or wider, the same on all tensor-parallel ranks; or the residual stream without `last`.
        """
        if positions is None:
            length = tokens.shape[1] if self.embedding is not None else tokens.shape[0] * self.residual_split
            positions = torch.arange(length, device=tokens.device)
        seen = positions if position_ids is None else position_ids.t()  # [S] or [S, B]
        keys = TokenKeys(samples, self._shard(positions)) if samples is not None and self.training else None
        x = self._embed(tokens, seen, keys) if self.embedding is not None else tokens
        info = self._tokens(positions, seen, keys, document_starts, x.dtype)
        offload = Offload(self.copies)
        for group, _ in self.groups:
            # Dropout needs no random state: a recomputed block draws the same masks from the same names.
            with offload.layer(self.layers[group.start : group.stop], wanted=group.start < self.offloaded_layers):
                x = self._run(group, x, info)
        if self.final_norm is None or self.head is None:
            return x
        x = self.final_norm(x)
        if labels is None:
            return self._logits(x)
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        axis, weight = self.state.tp, self.head.weight
        split, size = self.sequence_parallel, self.head_bytes
        return linear_cross_entropy(x, weight, labels.t(), mask.t(), axis, split, size, self.run)

    def _run(self, group: range, x: Tensor, info: Tokens) -> Tensor:
        """Some layers, recomputed in the backward as one where whole layers are."""
        granularity = self.recompute[group.start].granularity
        if granularity == "all-but-attention":
            info = replace(info, kept=Kept())

        def layers(x: Tensor) -> Tensor:
            for number in group:
                x = self.layers[number](x, info)
            return x

        if granularity not in ("full", "all-but-attention") or not torch.is_grad_enabled():
            return layers(x)
        with shared_out(x, self.state.tp, self.recompute[group.start].distributed):
            return recomputed(layers, x)

    def residual_shape(self, samples: int, positions: int) -> tuple[int, int, int]:
        """Shape of the residual stream of a microbatch [samples, positions] on this rank."""
        return positions // self.residual_split, samples, self.config.hidden_size

    def _tokens(
        self,
        positions: Tensor,
        seen: Tensor,
        keys: TokenKeys | None,
        document_starts: Documents | None,
        dtype: torch.dtype,
    ) -> Tokens:
        """Tables for positions `seen` in the dtype of the activations, and names for the tokens at `positions`."""
        config = self.config
        rotary = cos_sin(seen, config, dtype) if config.position_embedding_type == "rope" else None
        heads, kv_heads = (
            max(1, count // self.state.tp.size) for count in (config.num_attention_heads, config.kv_heads)
        )
        return Tokens(keys, rotary, self.attend.work(positions.shape[-1], heads, kv_heads, document_starts))

    def _shard(self, x: Tensor) -> Tensor:
        """This tensor-parallel rank's part of dim 0, with sequence parallelism."""
        return x.chunk(self.state.tp.size)[self.state.tp.rank] if self.sequence_parallel else x

    def _embed(self, tokens: Tensor, positions: Tensor, keys: TokenKeys | None) -> Tensor:
        assert self.embedding is not None
        x = self.embedding(tokens.t())
        if self.position_embedding is not None:
            seen = positions if positions.dim() == 2 else positions[:, None]
            x = x + lookup(self._shard(seen), self.position_embedding)
        return dropout(x, self.config.hidden_dropout, self.embedding_key, keys, self.run)

    def _logits(self, x: Tensor) -> Tensor:
        """[S, B, D] (or a shard of it) -> [B, S, V]."""
        assert self.head is not None
        axis = self.state.tp
        x = gather_from(x, axis) if self.sequence_parallel else copy_to(x, axis)
        local = (x @ self.head.weight.t()).permute(2, 1, 0)  # [V / T, B, S]
        return _GatherVocabulary.apply(local, axis).permute(1, 2, 0)


class _GatherVocabulary(torch.autograd.Function):
    """[V / T, B, S] -> [V, B, S]; every rank sees the same gradient, and takes its own part."""

    @staticmethod
    def forward(ctx, local, axis):  # type: ignore[no-untyped-def]
        ctx.axis = axis
        return start_all_gather(local, axis).wait()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.chunk(ctx.axis.size)[ctx.axis.rank], None
