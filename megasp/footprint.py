"""Bytes of a layer, part by part: what stays from a forward to its backward, and the most at a time in either.

A `Part` is one Function, priced beside its code. `chain` runs parts one after another as autograd does, in arithmetic
alone: an output lives until the next part has used it, what is kept until the backward of who keeps it. `recomputed`
and `as_part` are what recompute makes of them. Pure Python.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


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

    @cached_property
    def total(self) -> int:
        """All that is kept."""
        return sum(self.kept.values())


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
    backward, put_off = (_backward(parts, sizes, owner, first_keeper, total, residual, off) for off in (False, True))
    deferred = sum(part.deferred for part in parts)
    return Footprint(sizes[-1], {k: n for k, n in kept.items() if n}, forward, passing, backward, deferred, put_off)


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
) -> int:
    """The most at a time in the backward; with weight gradients `put_off`, what waits for them stays."""
    live = peak = kept + sizes[-1]
    last = max((index for index, part in enumerate(parts) if part.backward), default=-1)
    for index, part in reversed(list(enumerate(parts))):
        before = parts[index - 1] if index else None
        remade = before.forward if before is not None and before.remade else 0
        again = sizes[index] if remade else 0
        peak = max(peak, live + remade, live + again + part.backward)
        if part.backward:
            through = residual and index == last  # the residual stream holds it, too
            live += sizes[index] - (0 if through else sizes[index + 1])
        live -= sum(part.kept.values())
        live -= sum(sizes[tensor] for tensor, at in keeper.items() if at == index)
        live += part.deferred if put_off else 0
    return max(peak, live + sizes[0]) if residual else peak


def joined(footprints: Sequence[Footprint]) -> Footprint:
    """Footprints one after another, each with the output of the one before as its input."""
    kept: Counter[str] = Counter()
    forward = passing = backward = deferred = put_off = host = 0
    after = sum(each.deferred for each in footprints)  # the backward begins with the last one
    for each in footprints:
        after -= each.deferred
        forward = max(forward, sum(kept.values()) + each.forward)
        passing = max(passing, each.passing)
        backward = max(backward, sum(kept.values()) + each.backward)
        put_off = max(put_off, sum(kept.values()) + each.put_off + after)
        kept.update(each.kept)
        deferred += each.deferred
        host += each.host
    working = max(each.host_working for each in footprints)
    return Footprint(footprints[-1].output, dict(kept), forward, passing, backward, deferred, put_off, host, working)


def recomputed(
    inner: Footprint, size: int, also: dict[str, int] | None = None, name: str = "input", shares: int = 1
) -> Footprint:
    """The same, made again from its input of `size` bytes: nothing else is kept, but what `also` names. Of the input
    that is a share of so many, from which the backward makes it whole."""
    kept = {name: size // shares, **(also or {})}
    share = size // shares if shares > 1 else 0
    forward = inner.passing + sum(kept.values()) - (size if shares == 1 else 0)
    backward, put_off = (max(inner.forward + inner.output, most) + share for most in (inner.backward, inner.put_off))
    working = inner.host + inner.host_working
    return Footprint(
        inner.output, kept, forward, inner.passing, backward, inner.deferred, put_off, host_working=working
    )


def as_part(inner: Footprint, size: int, name: str) -> Part:
    """Parts that are made again from their input of `size` bytes, as one part."""
    backward = max(inner.forward, inner.backward - inner.output) - size
    return Part(name, inner.output, inner.passing - size, backward, deferred=inner.deferred)
