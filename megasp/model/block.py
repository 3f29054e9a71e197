"""A transformer block: norm, attention, norm, MLP, each branch added to the residual stream."""

import torch
from torch import Tensor, nn

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.model.activations import activation
from megasp.model.attention import Attention, Tokens
from megasp.model.dropout import dropout, site_key
from megasp.model.init import Factory
from megasp.model.kernels import EAGER, Kernels
from megasp.model.layers import ColumnParallelLinear, RowParallelLinear
from megasp.model.norm import Norm
from megasp.model.products import PLAIN, Products
from megasp.model.recompute import made_again, recomputed
from megasp.model.tiles import tiled
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import SequenceAttention


class MLP(nn.Module):
    """[S, B, D] -> [S, B, D] through a hidden layer of `config.mlp_size`, split over the tensor-parallel ranks.

    Args:
        recompute: whose "mlp_act" makes the activation's output again in the backward, "layernorm" the input.
        products: how the linear layers multiply.
        kernels: of the activation.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState,
        sequence_parallel: bool,
        factory: Factory,
        name: str,
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
        products: Products = PLAIN,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.remake = recompute.does("mlp_act")
        parts = ("gate", "up") if config.swiglu else ("up",)
        self.up = ColumnParallelLinear(
            config.hidden_size,
            {f"{name}.{part}": config.mlp_size for part in parts},
            state.tp,
            bias=config.add_bias_linear,
            sequence_parallel=sequence_parallel,
            init_std=config.init_method_std,
            factory=factory,
            products=products.keeping_input(recompute.does("layernorm")),
        )
        self.activation = activation(config, kernels.run)
        self.down = RowParallelLinear(
            config.mlp_size,
            config.hidden_size,
            state.tp,
            bias=config.add_bias_linear,
            sequence_parallel=sequence_parallel,
            init_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
            factory=factory,
            name=f"{name}.down",
            products=products.keeping_input(self.remake),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        activated = self.activation(hidden)
        with made_again(activated, self.activation, hidden, self.remake):
            return self.down(activated)


class Block(nn.Module):
    """One layer on the residual stream: [S, B, D] -> [S, B, D] ([S / T, B, D] with sequence parallelism).

    Args:
        recompute: of which "selective" is done here; the rest is of whole layers.
        tiles: in which the MLP and its norm are computed, along the sequence.
        products: how the linear layers multiply.
        kernels: of everything between the products.

    Where attention is over chunks of the sequence, the whole layer is computed chunk by chunk.
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
        tiles: int = 1,
        products: Products = PLAIN,
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.chunks, self.split = attend.sequence_chunks, state.tp.size if sequence_parallel else 1
        self.tiles = -(-tiles // self.chunks)  # of a chunk

        def norm(site: str) -> Norm:
            return Norm(
                config.normalization,
                config.hidden_size,
                config.norm_epsilon,
                state.tp,
                partial=sequence_parallel,
                factory=factory,
                name=f"{name}.{site}",
                kernel=kernels.norm,
            )

        self.input_norm = norm("input_norm")
        options = config, state, sequence_parallel
        self.attention = Attention(*options, attend, factory, f"{name}.attention", recompute, products, kernels)
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(*options, factory, f"{name}.mlp", recompute, products, kernels)
        self.dropout, self.run = config.hidden_dropout, kernels.run
        self.attention_key = site_key(factory.seed, f"{name}.attention residual")
        self.mlp_key = site_key(factory.seed, f"{name}.mlp residual")

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.chunks == 1:
            return self._layer(x, tokens)
        past = self.attention.attend.past()

        def chunk(x: Tensor, number: int) -> Tensor:
            return self._layer(x, tokens.chunk(number, self.chunks, self.split, past))

        return tiled(chunk, x, self.chunks, list(self.parameters()), past)

    def _layer(self, x: Tensor, tokens: Tokens) -> Tensor:
        x = x + dropout(self._attention(x, tokens), self.dropout, self.attention_key, tokens.keys, self.run)
        return x + dropout(self._mlp(x), self.dropout, self.mlp_key, tokens.keys, self.run)

    def _attention(self, x: Tensor, tokens: Tokens) -> Tensor:
        normed = self.input_norm(x)
        with made_again(normed, self.input_norm, x, self.recompute.does("layernorm")):
            return self.attention(normed, tokens)

    def _mlp(self, x: Tensor) -> Tensor:
        norm, mlp, does = self.mlp_norm, self.mlp, self.recompute.does
        if self.tiles > 1:
            return tiled(lambda x, _: mlp(norm(x)), x, self.tiles, [*norm.parameters(), *mlp.parameters()])
        if does("mlp") and does("layernorm") and torch.is_grad_enabled():
            return recomputed(lambda x: mlp(norm(x)), x)
        normed = norm(x)
        if does("mlp") and torch.is_grad_enabled():
            return recomputed(mlp, normed)
        with made_again(normed, norm, x, does("layernorm")):
            return mlp(normed)
