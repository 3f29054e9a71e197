"""Which activations are kept, recomputed or on the host: the flags, and which layers they mean. Pure."""

from dataclasses import dataclass

from megasp.config.flags import flag

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
        distributed: the tensor-parallel ranks share out the inputs that whole layers keep.
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)
    distributed: bool = False

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


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Activation memory."""

    recompute_granularity: str | None = flag(
        None,
        "activations to recompute in the backward: those of whole layers; of --recompute-modules; or all but the "
        "attention's output, so that attention runs once",
        choices=GRANULARITIES,
    )
    recompute_method: str | None = flag(
        None,
        "layers that recompute: uniform is all, with full in groups of --recompute-num-layers that keep one input; "
        "block is the first --recompute-num-layers of each stage, alternate every such one; uniform without it",
        choices=METHODS,
    )
    recompute_num_layers: int | None = flag(None, "layers of --recompute-method; 1 without it")
    recompute_modules: tuple[str, ...] = flag(
        (),
        "with --recompute-granularity selective: core_attn (attention and Ulysses' exchanges), mlp, layernorm (the "
        "norms' outputs), mlp_act (the output of the MLP's activation); core_attn without it",
        choices=MODULES,
    )
    distribute_saved_activations: bool = flag(
        False,
        "where whole layers are recomputed, each tensor-parallel rank keeps a share of their input, and the backward "
        "gathers it (with --sequence-parallel it is split as it is)",
    )
    cpu_offloading_activations: bool = flag(
        False, "keep what layers save for their backward in pinned memory of the host, and fetch it one layer ahead"
    )
    cpu_offloading_num_layers: int | None = flag(
        None, "first layers of each pipeline stage that do so; all of them without it"
    )
    tiled_mlp: int = flag(1, "tiles of a rank's sequence in which each MLP is computed, forward and backward")
    activation_tile_mb: int | None = flag(
        None,
        "megabytes that a tile may take: as many tiles of each MLP as that makes, where --tiled-mlp is not given, and "
        "the head's logits in chunks of so many (128 without it)",
    )
    sequence_chunks: int = flag(
        1,
        "chunks of a rank's sequence in which each whole layer is computed, forward and backward; attention reads the "
        "keys and values that earlier chunks left (FPDT)",
    )
    cpu_offloading_attention: bool = flag(
        False,
        "keep in pinned memory of the host what these chunks leave: keys, values, attention's output, and sums of "
        "gradients; each is fetched while the one before is computed",
    )

    @property
    def recompute(self) -> Recompute:
        """What is recomputed in the backward, and in which layers of a stage."""
        return Recompute(
            self.recompute_granularity,
            self.recompute_method or "uniform",
            self.recompute_num_layers or 1,
            self.recompute_modules or ("core_attn",),
            self.distribute_saved_activations,
        )

    @property
    def chunks_on_host(self) -> int:
        """Chunks of the sequence whose keys and values go to the host; 1 where they stay."""
        return self.sequence_chunks if self.cpu_offloading_attention else 1

    def offloaded(self, layers: int) -> int:
        """How many of a stage's first layers keep their activations on the host."""
        return min(layers, self.cpu_offloading_num_layers or layers) if self.cpu_offloading_activations else 0
