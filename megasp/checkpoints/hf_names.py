"""How a family's tensors are made of canonical ones: renamed, some fused, some transposed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megasp.config.hf_families import Family
from megasp.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stacked:
    """A tensor of Hugging Face's: canonical tensors one after the other along dim 0, and then maybe transposed.

    Attributes:
        key: its name there.
        parts: canonical names and their shapes.
        transposed: it is stored as [in, out].
    """

    key: str
    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False

    @property
    def stacked_shape(self) -> Shape:
        """Before it is transposed."""
        first = self.parts[0][1]
        return (sum(shape[0] for _, shape in self.parts), *first[1:])

    @property
    def shape(self) -> Shape:
        return self.stacked_shape[::-1] if self.transposed else self.stacked_shape


def stack(family: Family, shapes: Mapping[str, Shape]) -> list[Stacked]:
    """The family's tensors of a model with these canonical ones, in their order.

    Raises:
        CheckpointError: the family has no such tensor.
    """
    fused = {part: module for module, parts in family.fused.items() for part in parts}
    found: dict[str, list[tuple[str, Shape]]] = {}
    modules = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        layer, pattern = re.search(r"\d+", module), re.sub(r"\d+", "N", module)
        theirs = fused.get(pattern) or family.names.get(pattern)
        if theirs is None:
            rule = f"{family.architecture} has none such"
            raise CheckpointError(f"the checkpoint has a tensor {name}", rule, "keep this model in megasp")
        key = f"{theirs.replace('N', layer[0] if layer else '', 1)}.{kind}"
        modules[key] = theirs
        found.setdefault(key, []).append((name, shape))
    return [
        Stacked(
            key,
            _ordered(family.fused.get(modules[key]), parts),
            modules[key] in family.transposed and len(parts[0][1]) == 2,
        )
        for key, parts in found.items()
    ]


def _ordered(fused: Sequence[str] | None, parts: list[tuple[str, Shape]]) -> tuple[tuple[str, Shape], ...]:
    """Fused parts in the order of the table."""
    if fused is None:
        return tuple(parts)
    return tuple(sorted(parts, key=lambda part: fused.index(re.sub(r"\d+", "N", part[0].rpartition(".")[0]))))
