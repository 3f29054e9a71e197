"""Which activations are recomputed in the backward: of what, and in which layers. Pure."""

from dataclasses import dataclass

GRANULARITIES = ("full", "selective", "all-but-attention")
METHODS = ("uniform", "block", "alternate")
MODULES = ("core_attn", "layernorm", "mlp", "mlp_act")


@dataclass(frozen=True)
class Recompute:
    """What is recomputed.

    Attributes:
        granularity: "full" keeps a layer's input alone; "all-but-attention" keeps what attention gave, too, and does
            not run that again; "selective" recomputes `modules` alone; None nothing.
        method: "uniform" recomputes every layer, with `full` in groups of `num_layers` that keep one input; "block" the
            first `num_layers` layers of a stage; "alternate" every `num_layers`-th one.
        modules: with "selective": core_attn, attention's kernel with Ulysses' exchanges; mlp; layernorm, the outputs
            of the norms; mlp_act, the output of the MLP's activation.
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)

    def groups(self, layers: int) -> list[tuple[range, bool]]:
        """The layers of a stage in groups that run as one, and whether each is recomputed."""
        n = self.num_layers
        if self.granularity is None:
            return [(range(layer, layer + 1), False) for layer in range(layers)]
        if self.method == "uniform":
            return [(range(start, min(start + n, layers)), True) for start in range(0, layers, n)]
        chosen = range(min(n, layers)) if self.method == "block" else range(0, layers, n)
        return [(range(layer, layer + 1), layer in chosen) for layer in range(layers)]

    def does(self, module: str) -> bool:
        """Whether `module` alone is recomputed, in layers that recompute."""
        return self.granularity == "selective" and module in self.modules

    def attention_runs(self) -> dict[str, int]:
        """How often a layer that recomputes exchanges forward over the axes "ulysses" and "ring"."""
        again = self.granularity == "full" or self.does("core_attn")
        return {"ulysses": 1 + (again or self.granularity == "all-but-attention"), "ring": 1 + again}
