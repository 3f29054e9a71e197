"""Flags of fp8, with Megatron-LM's names, and what computes which recipe on which GPUs."""

from dataclasses import dataclass

from megasp.config.flags import flag

FORMATS = ("hybrid", "e4m3")

Capability = tuple[int, int]
"""An NVIDIA GPU's compute capability: 8.9 is Ada, 9.0 Hopper, 10.0 and higher Blackwell."""

BACKENDS: dict[str, dict[str, tuple[Capability, Capability]]] = {
    "torch": {
        "tensorwise": ((8, 9), (99, 0)),
        "rowwise": ((8, 9), (99, 0)),
        "blockwise": ((9, 0), (10, 0)),
        "mxfp8": ((10, 0), (99, 0)),
    },
    "transformer-engine": {
        "tensorwise": ((8, 9), (99, 0)),
        "blockwise": ((9, 0), (12, 0)),
        "mxfp8": ((10, 0), (12, 0)),
    },
}
"""Name of --fp8-backend -> recipe -> the first compute capability that has it, and the first that has not. PyTorch's
come first for `auto`."""

RECIPES = tuple(BACKENDS["torch"])

BLOCKED_RECIPES = ("blockwise", "mxfp8")
"""Those whose scales are of blocks."""

UNSERVED_RECIPES = {
    "delayed": "scales here follow from what is multiplied, never from steps before",
    "custom": "recipes are not given by code here",
}
"""Megatron-LM's other recipes, and why each is refused."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Linear layers in fp8, beside --bf16."""

    fp8_format: str | None = flag(
        None,
        "compute the products of linear layers in fp8, embedding and head excepted: e4m3, or hybrid with e5m2 for "
        "gradients of outputs",
        choices=FORMATS,
    )
    fp8_recipe: str | None = flag(
        None,
        "what shares a scale, which is always of the moment: the whole operand (tensorwise, without it), each of its "
        "rows (rowwise), 128 values of a row and 128 x 128 of a weight (blockwise; Hopper), or 32 values of a row "
        "(mxfp8; Blackwell)",
        metavar="{" + ",".join(RECIPES) + "}",
    )
    fp8_backend: str | None = flag(
        None,
        "what casts and multiplies: torch, or the package transformer-engine (not rowwise); auto, without it, is "
        "torch, and the package where PyTorch has no kernel of the recipe for the GPU, or of hybrid in blocks",
        choices=("auto", *BACKENDS),
    )
    first_last_layers_bf16: bool = flag(False, "leave the first and the last layers in bfloat16")
    num_layers_at_start_in_bf16: int | None = flag(None, "how many first layers; 1 without it")
    num_layers_at_end_in_bf16: int | None = flag(None, "how many last layers; 1 without it")

    @property
    def recipe(self) -> str:
        return self.fp8_recipe or "tensorwise"

    @property
    def backend(self) -> str:
        return self.fp8_backend or "auto"

    @property
    def backends(self) -> tuple[str, ...]:
        """Those to try, in order."""
        return tuple(BACKENDS) if self.backend == "auto" else (self.backend,)

    def layers(self, count: int) -> range:
        """Those of a model's layers whose linear layers compute in fp8."""
        if self.fp8_format is None:
            return range(0)
        if not self.first_last_layers_bf16:
            return range(count)
        ends = (1 if n is None else n for n in (self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16))
        start, end = ends
        return range(start, max(start, count - end))


def refusal(backend: str, recipe: str, capability: Capability, fp8_format: str = "e4m3") -> str | None:
    """Why a backend does not serve a recipe on a GPU of this capability, or None where it does."""
    if recipe not in BACKENDS[backend]:
        return f"it has no {recipe} scales"
    if backend == "torch" and recipe in BLOCKED_RECIPES and fp8_format == "hybrid":
        return "PyTorch's products with scales of blocks take e4m3 alone"
    first, end = BACKENDS[backend][recipe]
    if first <= capability < end:
        return None
    rule = f"{_dotted(first)} or higher" if end == (99, 0) else f"{_dotted(first)} up to below {_dotted(end)}"
    return f"{recipe} scales need compute capability {rule}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
