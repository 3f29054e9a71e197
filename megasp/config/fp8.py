"""Flags of fp8, with Megatron-LM's names."""

from dataclasses import dataclass

from megasp.config.flags import flag

FORMATS = ("hybrid", "e4m3")
RECIPES = ("tensorwise", "rowwise")

UNSERVED_RECIPES = {
    "delayed": "scales here follow from what is multiplied, never from steps before",
    "blockwise": "scales of blocks need kernels of single GPU generations, which are not served yet",
    "mxfp8": "scales of blocks need kernels of single GPU generations, which are not served yet",
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
        "what shares a scale, which is always of the moment: the whole operand (tensorwise, without it), or each of "
        "its rows (rowwise)",
        metavar="{" + ",".join(RECIPES) + "}",
    )
    first_last_layers_bf16: bool = flag(False, "leave the first and the last layers in bfloat16")
    num_layers_at_start_in_bf16: int | None = flag(None, "how many first layers; 1 without it")
    num_layers_at_end_in_bf16: int | None = flag(None, "how many last layers; 1 without it")

    @property
    def recipe(self) -> str:
        return self.fp8_recipe or "tensorwise"

    def layers(self, count: int) -> range:
        """Those of a model's layers whose linear layers compute in fp8."""
        if self.fp8_format is None:
            return range(0)
        if not self.first_last_layers_bf16:
            return range(count)
        ends = (1 if n is None else n for n in (self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16))
        start, end = ends
        return range(start, max(start, count - end))
