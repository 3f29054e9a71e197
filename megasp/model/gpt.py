"""The GPT: embedding, blocks, norm, head. Reads like a model of one device; the layers know their axes.

Shapes: B batch, S sequence on this rank (after the split over context-parallel ranks), T tensor-parallel ranks,
D hidden size, V vocabulary. The residual stream is [S, B, D], sequence first, so that splitting and gathering a
sequence never moves memory; with sequence parallelism it is [S / T, B, D].
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasp.collectives import copy_to, gather_from, start_all_gather
from megasp.config.schema import ModelConfig
from megasp.model.attention import Tokens
from megasp.model.block import Block
from megasp.model.dropout import TokenKeys, dropout, site_key
from megasp.model.init import Factory
from megasp.model.layers import VocabParallelEmbedding, replicated
from megasp.model.loss import linear_cross_entropy
from megasp.model.norm import Norm
from megasp.model.rotary import cos_sin
from megasp.parallel_state import ParallelState


class GPTModel(nn.Module):
    """A GPT, or some of its layers with or without the ends.

    Args:
        config: the architecture.
        state: the rank grid; one process without it.
        layers: numbers of the layers held; all without it.
        first: whether the embedding is here.
        last: whether the final norm and the head are here.
        sequence_parallel: split the residual stream over the tensor-parallel ranks.
        backend: attention kernel, "auto" for the best that this machine has.
        recompute: keep only each block's input, and run its forward again in the backward.
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
        backend: str = "auto",
        recompute: bool = False,
        factory: Factory | None = None,
    ) -> None:
        super().__init__()
        state = state or ParallelState.single()
        factory = factory or Factory(state.device)
        layers = layers if layers is not None else range(config.num_layers)
        self.config, self.state, self.recompute = config, state, recompute
        self.sequence_parallel = sequence_parallel and state.tp.size > 1
        options = self.sequence_parallel, backend, factory
        self.embedding = self._embedding(factory, "embedding") if first else None
        self.position_embedding = None
        if first and config.position_embedding_type == "learned_absolute":
            shape = (config.max_position_embeddings or 1024, config.hidden_size)
            piece = replicated("position_embedding.weight", shape, state.tp, partial=self.sequence_parallel)
            self.position_embedding = factory.parameter([piece.with_facts(init_std=config.init_method_std, decay=True)])
        self.embedding_key = site_key(factory.seed, "embedding")
        self.layers = nn.ModuleList(Block(config, state, *options, f"layers.{number}") for number in layers)
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
            )
            self.head = (
                self._embedding(factory, "head") if config.untie_embeddings_and_output_weights else self.embedding
            )

    def _embedding(self, factory: Factory, name: str) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            self.config.padded_vocab_size,
            self.config.hidden_size,
            self.state.tp,
            sequence_parallel=self.sequence_parallel,
            init_std=self.config.init_method_std,
            factory=factory,
            name=name,
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with labels the sum of the token losses.

        Args:
            tokens: ids, int64 [B, S]; or with `first` False the residual stream of the layer before.
            labels: next tokens, int64 [B, S].
            loss_mask: weight of each token's loss, [B, S]; ones without it.
            positions: global positions of this rank's tokens, int64 [S]; 0, 1, ... without it.
            samples: global sample numbers, int64 [B]; with them dropout is on.
            position_ids: what the position embedding sees, int64 [B, S], where positions restart with each document;
                `positions` without it.
        Returns:
            Logits [B, S, V] of every rank's vocabulary; or, with labels, the masked sum of this rank's token losses, a
            scalar in fp32 or wider, the same on all tensor-parallel ranks; or the residual stream without `last`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        seen = positions if position_ids is None else position_ids.t()  # [S] or [S, B]
        info = self._tokens(positions, seen, samples)
        x = self._embed(tokens, seen, info.keys) if self.embedding is not None else tokens
        for block in self.layers:
            # Dropout needs no random state: a recomputed block draws the same masks from the same names.
            x = (
                checkpoint(block, x, info, use_reentrant=False, preserve_rng_state=False)
                if self._keep(x)
                else block(x, info)
            )
        if self.final_norm is None or self.head is None:
            return x
        x = self.final_norm(x)
        if labels is None:
            return self._logits(x)
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        axis, weight = self.state.tp, self.head.weight
        return linear_cross_entropy(x, weight, labels.t(), mask.t(), axis, self.sequence_parallel)

    def _keep(self, x: Tensor) -> bool:
        return self.recompute and torch.is_grad_enabled()

    def _tokens(self, positions: Tensor, seen: Tensor, samples: Tensor | None) -> Tokens:
        """Tables for positions `seen`, and names for the tokens at `positions`."""
        config, dtype = self.config, next(self.parameters()).dtype
        rotary = cos_sin(seen, config, dtype) if config.position_embedding_type == "rope" else None
        if samples is None or not self.training:
            return Tokens(None, rotary)
        return Tokens(TokenKeys(samples, self._shard(positions)), rotary)

    def _shard(self, x: Tensor) -> Tensor:
        """This tensor-parallel rank's part of dim 0, with sequence parallelism."""
        return x.chunk(self.state.tp.size)[self.state.tp.rank] if self.sequence_parallel else x

    def _embed(self, tokens: Tensor, positions: Tensor, keys: TokenKeys | None) -> Tensor:
        assert self.embedding is not None
        x = self.embedding(tokens.t())
        if self.position_embedding is not None:
            seen = positions if positions.dim() == 2 else positions[:, None]
            x = x + self.position_embedding[self._shard(seen)]
        return dropout(x, self.config.hidden_dropout, self.embedding_key, keys)

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
