"""What a rank holds of weights, gradients and optimizer, in bytes, for every way of sharding them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds all the time.

    Attributes:
        parameters: in the compute dtype; `masters`: their fp32 copies, where they are other tensors.
        gradients: what they are summed in; `growing` where there is no buffer: they are made by the first backward.
        optimizer: Adam's two moments.
        buffers: weights that are gathered and gradients that are reduced at a time, where they are sharded.
    """

    parameters: int
    masters: int
    gradients: int
    optimizer: int
    buffers: int
    growing: bool


def state_bytes(
    elements: int, unit: int, item: int, ranks: int, shards: int, zero: int = 0, gradient_item: int | None = None
) -> StateBytes:
    """What a rank holds of its tensor- and pipeline-parallel part of a model.

    Args:
        elements: of all its parameters; `unit`: of the largest group that is gathered or reduced at a time, a layer or
            an end of the model.
        item: bytes of an element in the compute dtype.
        ranks: over which gradients are summed; `shards`: of those, over which states are sharded.
        zero: ZeRO stage (arXiv 1910.02054): 1 shards optimizer states and masters, 2 gradients, too, 3 weights, too.
        gradient_item: bytes of an element of the sums of gradients; those of the masters without it.
    """
    wide = max(item, 4)
    gradient_item = gradient_item or wide
    zero = zero if shards > 1 else 0
    copies = item < wide or zero > 0

    def held(size: int, least: int) -> int:
        return (-(-elements // shards) if zero >= least else elements) * size

    gathered = 2 * unit * item if zero == 3 else 0
    return StateBytes(
        parameters=0 if zero == 3 else elements * item,
        masters=held(wide, 1) if copies else 0,
        gradients=held(gradient_item, 2),
        optimizer=held(2 * wide, 1),
        buffers=gathered + (unit * (gradient_item + item) if zero else 0),
        growing=not copies and ranks == 1,
    )
