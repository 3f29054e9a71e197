"""Grouped-query self-attention, split over tensor-parallel ranks by heads and over Ulysses ranks by sequence."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.model.dropout import TokenKeys, attention_bits, site_key
from megasp.model.init import Factory
from megasp.model.kernels import EAGER, Kernels
from megasp.model.layers import ColumnParallelLinear, RowParallelLinear
from megasp.model.norm import Norm
from megasp.model.products import PLAIN, Products
from megasp.model.recompute import recomputed
from megasp.model.rotary import rotate_
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import Chunk, Kept, Past, SequenceAttention, Work
from megasp.sequence_parallel.block_kernels import AttentionDropout


@dataclass(frozen=True)
class Tokens:
    """What a block must know of the tokens that it sees.

    Args:
        keys: names of the tokens of the residual stream on this rank; None drops nothing.
        rotary: cos and sin tables of the positions that attention's q and k have on this rank; None without rotary.
        work: which of them attention computes where; all on this rank without it.
        kept: where one layer keeps attention's result for its recompute.
    """

    keys: TokenKeys | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    work: Work | Chunk | None = None
    kept: Kept | None = None

    def chunk(self, number: int, chunks: int, split: int, past: Past) -> "Tokens":
        """The same for one chunk of the residual stream, which `split` tensor-parallel ranks share."""
        keys, rotary = self.keys, self.rotary
        if keys is not None:
            keys = replace(keys, positions=keys.positions.chunk(chunks)[number])
        if rotary is not None:
            # Of the positions of every one of these ranks, for attention gathers them.
            cos, sin = (table.unflatten(0, (split, chunks, -1))[:, number].flatten(0, 1) for table in rotary)
            rotary = cos, sin
        assert isinstance(self.work, Work)
        return Tokens(keys, rotary, Chunk(self.work, number, past))


class Attention(nn.Module):
    """Self-attention: [S, B, D] -> [S, B, D] (or [S / T, B, D] -> [S / T, B, D] with sequence parallelism).

    Args:
        config: the model's; its head counts are divisible as `megasp.config.validate` says.
        name: canonical name of this module.
        attend: attention of q to k and v over the sequence, wherever its parts are.
        recompute: whose "core_attn" runs `attend` again in the backward, "layernorm" the norm before.
        products: how the linear layers multiply.
        kernels: of norms and rotary positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState,
        sequence_parallel: bool,
        attend: SequenceAttention,
        factory: Factory,
        name: str,
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
        products: Products = PLAIN,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.head_dim, self.run = config.head_dim, kernels.run
        heads, kv_heads, tp = config.num_attention_heads, config.kv_heads, state.tp
        copies = max(1, tp.size // kv_heads)  # tensor-parallel ranks that share a kv head
        q, k, v = (f"{name}.{part}" for part in "qkv")
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            {q: heads * self.head_dim, k: kv_heads * self.head_dim, v: kv_heads * self.head_dim},
            tp,
            bias=config.qkv_bias,
            sequence_parallel=sequence_parallel,
            replicas={k: copies, v: copies},
            init_std=config.init_method_std,
            factory=factory,
            products=products.keeping_input(recompute.does("layernorm")),
        )
        self.local_heads = heads // tp.size, max(1, kv_heads // tp.size)
        self.q_norm = self.k_norm = None
        if config.qk_layernorm:
            shape = config.normalization, self.head_dim, config.norm_epsilon
            norm = partial(Norm, *shape, tp, partial=True, factory=factory, kernel=kernels.norm)
            self.q_norm, self.k_norm = norm(name=f"{name}.q_norm"), norm(name=f"{name}.k_norm")
        self.attend, self.recompute = attend, recompute.does("core_attn")
        self.dropout, self.key = config.attention_dropout, site_key(factory.seed, name)
        self.first_head = tp.rank * self.local_heads[0]
        self.o = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            tp,
            bias=config.add_bias_linear,
            sequence_parallel=sequence_parallel,
            init_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
            factory=factory,
            name=f"{name}.o",
            # Its input is the kernel's output, which that keeps, unless the kernel runs again or heads were exchanged.
            products=products.keeping_input(state.ulysses.size == 1 and not self.recompute),
        )

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        heads, kv_heads = self.local_heads
        qkv = self.qkv(x)
        if tokens.rotary is not None and self.q_norm is None:
            qkv = rotate_(qkv, heads + kv_heads, self.head_dim, tokens.rotary, self.run)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([heads, kv_heads, kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if tokens.rotary is not None:
                q, k = (rotate_(part, part.shape[2], self.head_dim, tokens.rotary, self.run) for part in (q, k))
        attend = partial(self.attend, work=tokens.work, dropout=self._dropout(tokens), kept=tokens.kept)
        again = self.recompute and torch.is_grad_enabled()
        out = recomputed(attend, q, k, v) if again else attend(q, k, v)
        return self.o(out.flatten(2))

    def _dropout(self, tokens: Tokens) -> AttentionDropout | None:
        if self.dropout == 0 or tokens.keys is None:
            return None
        return AttentionDropout(self.dropout, partial(attention_bits, self.key), tokens.keys.samples, self.first_head)
