"""How many samples each step takes, with or without a ramp-up: a pure function of the samples consumed before it.

Megatron-LM's rule for `--rampup-batch-size START INCREMENT SAMPLES`: the batch grows from START to the global batch
size by INCREMENT, each size for an equal share of the first SAMPLES samples.

    --rampup-batch-size 16 16 300 --global-batch-size 64:   16 for samples 0 to 99, then 32, then 48, from 300 on 64
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """Batch sizes of a run.

    Attributes:
        final: the global batch size, after the ramp-up if there is one.
        start, increment, samples: of the ramp-up; no samples, no ramp-up.
    """

    final: int
    start: int = 0
    increment: int = 0
    samples: int = 0

    def at(self, consumed: int) -> int:
        """Samples of the step that begins after `consumed` samples."""
        if consumed >= self.samples:
            return self.final
        increments = (self.final - self.start) // self.increment
        return self.start + consumed * increments // self.samples * self.increment

    def sizes(self) -> list[int]:
        """Every size that a step can have, ascending."""
        return [*range(self.start, self.final, self.increment), self.final] if self.samples else [self.final]

    def advance(self, consumed: int, steps: int) -> int:
        """Samples consumed after `steps` more steps; a loop over batch sizes, not over steps."""
        while steps > 0 and consumed < self.samples:
            batch = self.at(consumed)
            here = min(steps, -(-(self._end_of(batch) - consumed) // batch))
            consumed, steps = consumed + here * batch, steps - here
        return consumed + steps * self.final

    def steps(self, consumed: int, until: int) -> int:
        """Whole steps that samples [consumed, until) hold."""
        count = 0
        while consumed < self.samples:
            batch = self.at(consumed)
            here = min(-(-(self._end_of(batch) - consumed) // batch), (until - consumed) // batch)
            if here <= 0:
                return count
            consumed, count = consumed + here * batch, count + here
        return count + max(0, until - consumed) // self.final

    def _end_of(self, batch: int) -> int:
        """The first count of consumed samples whose batch is larger than `batch`."""
        level, increments = (batch - self.start) // self.increment + 1, (self.final - self.start) // self.increment
        return -(-level * self.samples // increments)
