"""What a rank holds of weights, gradients and optimizer, in bytes, for every way of sharding them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megasp.footprint import Reduction, Weights


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds all the time.

    Attributes:
        parameters: in the compute dtype; `masters`: their fp32 copies, where they are other tensors.
        gradients: most that they are summed in; `buffered`: whether that is a buffer, which is there all the time.
        stepped: of the sums in the optimizer's step, beside a buffer, where that is fuller than the passes before.
        optimizer: Adam's two moments.
        host: component -> bytes in the host's memory.
    """

    parameters: int
    masters: int
    gradients: int
    buffered: bool
    stepped: int
    optimizer: int
    host: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharding:
    """How the ranks of a tensor- and pipeline-parallel part of a model share out what they hold of it.

    Attributes:
        item: bytes of an element in the compute dtype; `made`: of a gradient as a backward makes it; `summed`: of the
            sums of gradients, on their way between ranks, too.
        ranks: over which gradients are summed; `shards`: of those, over which states are sharded.
        zero: ZeRO stage (arXiv 1910.02054): 1 shards optimizer states and masters, 2 gradients, too, 3 weights, too;
            0 where nothing is sharded.
        once: the step reduces once: it has one microbatch.
        deferred: weight gradients come apart from the backward, and are reduced when all are there.
        host_share: share of the elements whose masters and moments are on the host, beside weights on the device.
        host_weights: with ZeRO-3: all that is sharded is on the host.
        largest: elements of the largest tensor, which comes from there at a time.
    """

    item: int
    made: int
    summed: int
    ranks: int = 1
    shards: int = 1
    zero: int = 0
    once: bool = True
    deferred: bool = False
    host_share: float = 0.0
    host_weights: bool = False
    largest: int = 0

    @property
    def wide(self) -> int:
        """Bytes of an element of masters and moments."""
        return max(self.item, 4)

    @property
    def buffered(self) -> bool:
        """Whether sums of gradients have a buffer."""
        return not self.zero and (self.item < self.wide or self.ranks > 1)

    @property
    def reduces(self) -> str:
        """After which backwards gradients are reduced: "always", the "last" one of a stage, "finally" after all of
        them, or "never"."""
        if not self.zero:
            return "never"
        if self.deferred:
            return "finally"
        return "always" if self.zero > 1 or self.once else "last"

    def states(self, elements: int) -> StateBytes:
        """What is held of so many elements."""
        wide, copies = self.wide, self.item < self.wide or self.zero > 0
        shard = -(-elements // self.shards) if self.zero else elements
        masters, moments = shard * wide, 2 * shard * wide
        away = 1.0 if self.host_weights else self.host_share
        # Sharded masters stay in any case, for it is from them that weights are gathered.
        stay = masters if self.zero and not self.host_weights else masters - round(away * masters)
        host = {
            "master weights": round(away * masters),
            "gradients": masters * self.host_weights,
            "optimizer states": round(away * moments),
        }
        summed = shard * wide if self.reduces == "always" else elements * self.summed
        stepped = 0 if self.zero or (self.buffered and self.summed == wide) else elements * wide
        return StateBytes(
            parameters=0 if self.zero == 3 else elements * self.item,
            masters=stay if copies else 0,
            gradients=0 if self.host_weights else summed,
            buffered=self.buffered,
            stepped=stepped,
            optimizer=moments - round(away * moments),
            host={name: size for name, size in host.items() if size},
        )

    def whole(self, elements: int) -> int:
        """Bytes of weights that are gathered, where they are not whole all the time."""
        return elements * self.item if self.zero == 3 else 0

    def buffer(self, elements: int) -> int:
        """Bytes into which weights are gathered."""
        return elements * self.item if self.shards > 1 else 0

    def cast(self, elements: int) -> int:
        """Bytes of a rank's own part on its way there: cast together, or one by one where nothing is gathered; from the
        host one by one."""
        largest = min(elements, self.largest)
        narrow = -(-elements // self.shards) if self.shards > 1 else largest
        wide = -(-largest // self.shards) * self.wide * self.host_weights
        return narrow * self.item * (self.item < self.wide) + wide

    def reduction(self, elements: int, alone: bool) -> Reduction:
        """Of parameters that are reduced together, or of one `alone`, which `fully_shard` holds while its shard
        arrives."""
        whole = self.made if self.reduces == "always" else self.summed
        shard = -(-elements // self.shards)
        arrives = self.summed + (self.wide if self.summed < self.wide else 0)
        return Reduction(
            elements * whole,
            elements * self.summed,
            0 if self.host_weights else shard * self.wide,
            shard * arrives if alone and self.shards > 1 else 0,
            elements * self.item if self.zero < 3 else 0,
        )

    def gradients(self, elements: int) -> int:
        """Bytes of gradients that have no buffer, when they have been made."""
        return 0 if self.buffered else elements * (self.made if self.reduces in ("always", "never") else self.summed)


def stage_weights(
    sharding: Sharding, units: Sequence[Sequence[int]], beside: Sequence[int], first: bool
) -> list[Weights]:
    """The weights of a pipeline stage as `fully_shard` gathers and reduces them, by what runs as one.

    Forward, a unit is gathered into a buffer and copied out of it; the buffer lives until the next unit's is full. What
    is no unit is whole throughout. Backward, layers and norm are gathered again, each while the one after it runs, and
    reduced behind their own backward; what is sent lives until the next one is reduced.

    Args:
        units: elements of the units in each piece: the embedding; a layer, or several that are recomputed together; the
            final norm.
        beside: elements of what is no unit (head, learned positions, a tied embedding), where their gradients are made.
        first: the first piece is the embedding.
    """
    rest, before, found = sum(beside), sum(beside), []
    for index, (piece, own) in enumerate(zip(units, beside, strict=True)):
        gradients, embedding = sharding.gradients(sum(piece) + own), first and index == 0
        if not sharding.zero:
            found.append(Weights(gradients=gradients))
            continue
        reductions = [sharding.reduction(elements, alone=embedding) for elements in piece]
        if index == 0 and rest:  # after a layer, but before the embedding
            reductions.insert(0 if first else len(piece), sharding.reduction(rest, alone=True))
        unit = max(piece, default=0)
        sent = sharding.buffer(unit or rest)
        alone = sharding.whole(unit) if sharding.shards == 1 else 0  # which is not gathered ahead
        arriving = sharding.whole(rest) + sharding.buffer(before) + (sent or alone) + sharding.cast(unit)
        forward = sharding.whole(rest + unit) + sent
        returning = backward = ahead = 0
        if sharding.zero == 3 and not embedding:
            following = max(units[index - 1]) if index > first else 0
            ahead = sharding.buffer(following)
            backward = sharding.whole(sum(piece)) + (ahead if len(piece) == 1 else 0)
            coming = sharding.cast(unit) if alone else ahead + sharding.cast(following)
            returning = sharding.whole(unit) + max(sent, coming)
        whole = sum(piece) * sharding.item if sharding.zero < 3 else 0
        runs = gradients, max(1, len(piece)), tuple(reductions)
        found.append(Weights(arriving, forward, returning, backward, ahead, whole, *runs))
        before = unit
    return found
