"""What a rank holds of weights, gradients and optimizer, in bytes, for every way of sharding them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds all the time.

    Attributes:
        parameters: in the compute dtype; `masters`: their fp32 copies, where they are other tensors.
        gradients: most that they are summed in; `growing`: bytes of an element where there is no buffer, so that a
            step's first backward makes them; 0 where there is one.
        optimizer: Adam's two moments.
        gathered: weights that are there whole at a time, where they are sharded: of the layer that runs, of the next
            one, and of the head.
        reducing: gradients of a layer that are reduced while the next one's backward runs.
        lingering: those of the head, reduced last, which `fully_shard` lets go in the next microbatch's backward.
        host: component -> bytes in the host's memory.
    """

    parameters: int
    masters: int
    gradients: int
    optimizer: int
    gathered: int
    reducing: int
    lingering: int
    growing: float
    host: dict[str, int] = field(default_factory=dict)


def state_bytes(
    elements: int,
    layer: int,
    heads: int,
    item: int,
    ranks: int,
    shards: int,
    zero: int = 0,
    gradient_item: int | None = None,
    microbatches: int = 1,
    host_share: float = 0.0,
    host_weights: bool = False,
) -> StateBytes:
    """What a rank holds of its tensor- and pipeline-parallel part of a model.

    Args:
        elements: of all its parameters; `layer`: of one layer, which are gathered and reduced together; `heads`: of
            final norm and head, which are gathered through the forward.
        item: bytes of an element in the compute dtype.
        ranks: over which gradients are summed; `shards`: of those, over which states are sharded.
        zero: ZeRO stage (arXiv 1910.02054): 1 shards optimizer states and masters, 2 gradients, too, 3 weights, too.
        gradient_item: bytes of an element of the sums of gradients; those of the masters without it.
        microbatches: of a step.
        host_share: share of the elements whose masters and moments are on the host, beside weights on the device.
        host_weights: with ZeRO-3: all that is sharded is on the host. A group's fp32 shards pass through the device.
    """
    wide = max(item, 4)
    gradient_item = gradient_item or wide
    zero = zero if shards > 1 or host_weights else 0
    copies = item < wide or zero > 0

    def held(size: int, least: int) -> int:
        return (-(-elements // shards) if zero >= least else elements) * size

    def left(size: int, share: float = host_share) -> int:
        """What stays on the device."""
        return 0 if host_weights else size - round(share * size)

    if zero == 1 and microbatches > 1:
        growing = float(gradient_item)
    else:
        growing = wide / shards if zero else wide * (not copies and ranks == 1)
    masters, moments = held(wide, 1), held(2 * wide, 1)
    host = {
        "master weights": masters if host_weights else round(host_share * masters),
        "gradients": masters if host_weights else 0,
        "optimizer states": moments - left(moments),
    }
    return StateBytes(
        parameters=0 if zero == 3 else elements * item,
        # Sharded ones stay, for it is from them that weights are gathered.
        masters=left(masters, 0 if zero else host_share) if copies else 0,
        gradients=0 if host_weights else round(elements * (growing or gradient_item)),
        optimizer=left(moments),
        gathered=(2 * layer + heads) * item + host_weights * -(-layer // shards) * wide if zero == 3 else 0,
        reducing=layer * gradient_item if zero else 0,
        lingering=heads * gradient_item if zero > 1 and microbatches > 1 else 0,
        growing=0 if host_weights else growing,
        host={name: size for name, size in host.items() if size},
    )
