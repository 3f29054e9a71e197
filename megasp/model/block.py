"""A transformer block: norm, attention, norm, MLP, each branch added to the residual stream."""

from torch import Tensor, nn

from megasp.config.schema import ModelConfig
from megasp.model.activations import activation
from megasp.model.attention import Attention, Tokens
from megasp.model.dropout import dropout, site_key
from megasp.model.init import Factory
from megasp.model.layers import ColumnParallelLinear, RowParallelLinear
from megasp.model.norm import Norm
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import SequenceAttention


class MLP(nn.Module):
    """[S, B, D] -> [S, B, D] through a hidden layer of `config.mlp_size`, split over the tensor-parallel ranks."""

    def __init__(
        self, config: ModelConfig, state: ParallelState, sequence_parallel: bool, factory: Factory, name: str
    ) -> None:
        super().__init__()
        parts = ("gate", "up") if config.swiglu else ("up",)
        self.up = ColumnParallelLinear(
            config.hidden_size,
            {f"{name}.{part}": config.mlp_size for part in parts},
            state.tp,
            bias=config.add_bias_linear,
            sequence_parallel=sequence_parallel,
            init_std=config.init_method_std,
            factory=factory,
        )
        self.activation = activation(config)
        self.down = RowParallelLinear(
            config.mlp_size,
            config.hidden_size,
            state.tp,
            bias=config.add_bias_linear,
            sequence_parallel=sequence_parallel,
            init_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
            factory=factory,
            name=f"{name}.down",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One layer on the residual stream: [S, B, D] -> [S, B, D] ([S / T, B, D] with sequence parallelism)."""

    def __init__(
        self,
        config: ModelConfig,
        state: ParallelState,
        sequence_parallel: bool,
        attend: SequenceAttention,
        factory: Factory,
        name: str,
    ) -> None:
        super().__init__()

        def norm(site: str) -> Norm:
            return Norm(
                config.normalization,
                config.hidden_size,
                config.norm_epsilon,
                state.tp,
                partial=sequence_parallel,
                factory=factory,
                name=f"{name}.{site}",
            )

        self.input_norm = norm("input_norm")
        self.attention = Attention(config, state, sequence_parallel, attend, factory, f"{name}.attention")
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(config, state, sequence_parallel, factory, f"{name}.mlp")
        self.dropout = config.hidden_dropout
        self.attention_key = site_key(factory.seed, f"{name}.attention residual")
        self.mlp_key = site_key(factory.seed, f"{name}.mlp residual")

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        x = x + dropout(self.attention(self.input_norm(x), tokens), self.dropout, self.attention_key, tokens.keys)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.mlp_key, tokens.keys)
