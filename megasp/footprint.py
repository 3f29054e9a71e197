"""Bytes of a layer, part by part: what stays from a forward to its backward, and the most at a time in either.

A `Part` is one Function, priced beside its code. `chain` runs parts one after another as autograd does, in arithmetic
alone: an output lives until the next part has used it, what is kept until the backward of who keeps it. `recomputed`
and `as_part` are what recompute makes of them. Pure Python.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Part:
    """One Function, in bytes.

    Attributes:
        name: kind of its output, under which that counts where it is kept.
        output: its size; None where the input itself is changed, or passed on.
        forward: the most that its forward has at a time beside its input: its output, what it keeps, working memory.
        backward: the most that its backward has beside what is kept and the output's gradient: the input's gradient,
            weight gradients until they are added to their sum, working memory. 0: the gradient passes unchanged.
        kept: kind -> size of what it keeps beside input and output.
        keeps_input, keeps_output: whether it needs them in the backward.
        remade: its output is not kept but made again when the next part's backward needs it.
        deferred: what waits for a weight gradient that is put off, where it is this part's.
        gradients: of its weights, as they are made.
        growing, put_off: as `backward`, where those of what it is made of stay, and where its own is put off; as
            `backward` without them.
    """

    name: str
    output: int | None
    forward: int = 0
    backward: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    keeps_input: bool = True
    keeps_output: bool = False
    remade: bool = False
    deferred: int = 0
    gradients: int = 0
    growing: int = 0
    put_off: int = 0


@dataclass(frozen=True)
class Footprint:
    """Parts that run one after another, in bytes.

    Attributes:
        output: size of what the next ones get.
        kept: kind -> size of what stays for the backward, the input among it where a part needs it.
        forward: the most at a time in the forward, with the input.
        passing: the same where nothing is kept.
        backward: the most at a time in the backward, with all that was kept and the output's gradient.
        deferred: what waits for weight gradients that are put off.
        put_off: as `backward`, where they are.
        host: what is kept on the host; `host_working`: the most that is there at a time beside.
        gradients: of its weights, as they are made; `growing`: as `backward`, where they stay when they are made;
            `largest`: of those that may be put off; `beside`: the most that there is of one beside all before it, less
            what is still to come, when a copy of each stays.
    """

    output: int
    kept: dict[str, int]
    forward: int
    passing: int
    backward: int
    deferred: int = 0
    put_off: int = 0
    host: int = 0
    host_working: int = 0
    gradients: int = 0
    growing: int = 0
    largest: int = 0
    beside: int = 0

    @cached_property
    def total(self) -> int:
        """All that is kept."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Reduction:
    """Gradients of weights that are summed over ranks together, in bytes.

    Attributes:
        whole: on every rank, before; `buffer`: of what is sent, which is there beside them.
        shard: what stays; `arriving`: what more there is of it while the last of them are still whole.
        weights: that were whole for the step, and are let go of before.
    """

    whole: int
    buffer: int
    shard: int
    arriving: int
    weights: int


@dataclass(frozen=True)
class Weights:
    """The weights of what runs as one, where they are gathered for it or their gradients have no buffer, in bytes.

    Attributes:
        arriving: weights that are whole, and buffers of their gathering, at most before its forward; `forward`: while
            it runs.
        returning, backward: the same of its backward; `ahead`: when this has ended, for what runs next.
        whole: weights that stay whole for the step, from its first forward on.
        gradients: that its backward makes; `units`: layers that do so one after another.
        reductions: which it ends with, one after another, where gradients are reduced in it.
    """

    arriving: int = 0
    forward: int = 0
    returning: int = 0
    backward: int = 0
    ahead: int = 0
    whole: int = 0
    gradients: int = 0
    units: int = 1
    reductions: tuple[Reduction, ...] = ()


def pinned(size: int) -> int:
    """What PyTorch's allocator of pinned memory takes of the host for so many bytes: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def chain(parts: Sequence[Part], size: int, name: str = "input", residual: bool = False) -> Footprint:
    """What parts hold that run one after another on an input of `size` bytes.

    Args:
        name: kind of the input.
        residual: the input is added to the last part's output: it lives through the forward, and the output's gradient
            through the backward.
    """
    # Tensor i is what part i gets. A part that has no output of its own passes on the same tensor.
    sizes, names = [size], [name]
    for part in parts:
        sizes.append(sizes[-1] if part.output is None else part.output)
        names.append(names[-1] if part.output is None else part.name)
    same = [index for index, part in enumerate(parts) if part.output is None]
    owner = list(range(len(sizes)))
    for index in same:
        owner[index + 1] = owner[index]
    first_keeper: dict[int, int] = {}  # tensor -> the part whose backward is the last to need it
    for index, part in reversed(list(enumerate(parts))):
        remade = index > 0 and parts[index - 1].remade
        if part.keeps_input and not remade:
            first_keeper[owner[index]] = index
        if part.keeps_output:
            first_keeper[owner[index + 1]] = index
    kept: Counter[str] = Counter()
    for tensor in first_keeper:
        kept[names[tensor]] += sizes[tensor]
    for part in parts:
        kept.update(part.kept)
    forward = _forward(parts, sizes, owner, set(first_keeper), residual, keep=True)
    passing = _forward(parts, sizes, owner, set(), residual, keep=False)
    total = sum(kept.values())
    ways = (False, False), (True, False), (False, True)
    backward, put_off, growing = (_backward(parts, sizes, owner, first_keeper, total, residual, *way) for way in ways)
    return Footprint(
        sizes[-1],
        {kind: size for kind, size in kept.items() if size},
        forward,
        passing,
        backward,
        sum(part.deferred for part in parts),
        put_off,
        gradients=sum(part.gradients for part in parts),
        growing=growing,
        largest=max((part.gradients for part in parts if part.deferred), default=0),
        beside=_beside([(part.gradients, part.gradients) for part in parts if part.deferred]),
    )


def _beside(made: Sequence[tuple[int, int]]) -> int:
    """The most of one's own that there is beside all, of (own, all) of what is made from the last to the first."""
    to_come = accumulate((whole for _, whole in made), initial=0)
    return max((own - less for (own, _), less in zip(made, to_come, strict=False)), default=0)


def _forward(
    parts: Sequence[Part], sizes: list[int], owner: list[int], kept: set[int], residual: bool, keep: bool
) -> int:
    """The most at a time in the forward."""
    stays = kept | ({0} if residual else set())
    live = peak = sizes[0]
    for index, part in enumerate(parts):
        peak = max(peak, live + part.forward)
        if owner[index + 1] != owner[index]:
            live += sizes[index + 1] - (0 if owner[index] in stays else sizes[index])
        live += sum(part.kept.values()) if keep else 0
    return max(peak, live + sizes[-1]) if residual else peak


def _backward(
    parts: Sequence[Part],
    sizes: list[int],
    owner: list[int],
    keeper: dict[int, int],
    kept: int,
    residual: bool,
    put_off: bool,
    growing: bool,
) -> int:
    """The most at a time in the backward; with weight gradients `put_off`, what waits for them stays; where these are
    `growing`, they stay themselves."""
    live = peak = kept + sizes[-1]
    last = max((index for index, part in enumerate(parts) if part.backward), default=-1)
    for index, part in reversed(list(enumerate(parts))):
        before = parts[index - 1] if index else None
        remade = before.forward if before is not None and before.remade else 0
        again = sizes[index] if remade else 0
        needed = part.growing * growing or part.put_off * put_off or part.backward
        peak = max(peak, live + remade, live + again + needed)
        if part.backward:
            through = residual and index == last  # the residual stream holds it, too
            live += sizes[index] - (0 if through else sizes[index + 1])
        live -= sum(part.kept.values())
        live -= sum(sizes[tensor] for tensor, at in keeper.items() if at == index)
        live += part.deferred * put_off + part.gradients * growing
    return max(peak, live + sizes[0]) if residual else peak


def joined(footprints: Sequence[Footprint], reduced: bool = False) -> Footprint:
    """Footprints one after another, each with the output of the one before as its input; gradients of weights are
    `reduced` and let go of behind each backward, or are not."""
    kept: Counter[str] = Counter()
    forward = passing = backward = deferred = put_off = host = growing = 0
    after = sum(each.deferred for each in footprints)  # the backward begins with the last one
    grown = gradients = sum(each.gradients for each in footprints)
    for each in footprints:
        after -= each.deferred
        grown -= each.gradients
        forward = max(forward, sum(kept.values()) + each.forward)
        passing = max(passing, each.passing)
        backward = max(backward, sum(kept.values()) + each.backward)
        put_off = max(put_off, sum(kept.values()) + each.put_off + after)
        growing = max(growing, sum(kept.values()) + each.growing + (0 if reduced else grown))
        kept.update(each.kept)
        deferred += each.deferred
        host += each.host
    working = max(each.host_working for each in footprints)
    output = footprints[-1].output
    largest = max(each.largest for each in footprints)
    beside = _beside([(each.beside, each.gradients) for each in footprints])
    rest = deferred, put_off, host, working, gradients, growing, largest, beside
    return Footprint(output, dict(kept), forward, passing, backward, *rest)


def recomputed(
    inner: Footprint, size: int, also: dict[str, int] | None = None, name: str = "input", shares: int = 1
) -> Footprint:
    """The same, made again from its input of `size` bytes: nothing else is kept, but what `also` names. Of the input
    that is a share of so many, from which the backward makes it whole."""
    kept = {name: size // shares, **(also or {})}
    share = size // shares if shares > 1 else 0
    forward = inner.passing + sum(kept.values()) - (size if shares == 1 else 0)
    again, working = inner.forward + inner.output, inner.host + inner.host_working
    return replace(
        inner,
        kept=kept,
        forward=forward,
        backward=max(again, inner.backward) + share,
        put_off=max(again, inner.put_off) + share,
        growing=max(again, inner.growing) + share,
        host=0,
        host_working=working,
    )


def as_part(inner: Footprint, size: int, name: str) -> Part:
    """Parts that are made again from their input of `size` bytes, as one part."""
    backward, growing = (max(inner.forward, most - inner.output) - size for most in (inner.backward, inner.growing))
    return Part(
        name,
        inner.output,
        inner.passing - size,
        backward,
        deferred=inner.deferred,
        gradients=inner.gradients,
        growing=growing,
    )
