"""The phases of a run: what its samples are made of, and from which step on.

A run's order of samples is a function of (seed, step, its list of phases), and a checkpoint stores the list:

    phase 1: step 0, sample 0        web 0.7, books 0.3, --seq-length 4096
    phase 2: step 900, sample 57600  web 0.5, books 0.5, --seq-length 8192      web goes on in its epoch 0 at ...

A change of sequence length, batch size, blend or corpus begins a phase where the last checkpoint stands. Each dataset
goes on at its own `Position`, so a phase neither repeats nor skips what an earlier one read; a dataset that left the
blend and comes back goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megasp.config.batch_schedule import BatchSchedule
from megasp.data import megatron_order
from megasp.data.blend import BlendedDataset, BlendOrder, parse_data_path, unique_names
from megasp.data.gpt_dataset import GPTDataset, Position, split_ranges
from megasp.data.indexed_dataset import IndexedDataset
from megasp.data.megatron_order import MegatronBlend, MegatronDataset
from megasp.errors import DataError


@dataclass(frozen=True)
class Part:
    """One dataset of a phase.

    Attributes:
        weight: share of the samples, an exact fraction as text; "" in Megatron-LM's order where none was given.
        fingerprint: of its corpus and split (`GPTDataset.fingerprint`).
        tokens: of its split (`GPTDataset.tokens`).
        position: where the phase begins to read it.
    """

    name: str
    prefix: str
    weight: str
    fingerprint: str
    tokens: int
    position: Position


@dataclass(frozen=True)
class Phase:
    """What samples are made of from `step` (steps finished before) and `sample` (samples consumed before) on.

    Attributes:
        megatron_samples: in Megatron-LM's order, how many samples the run asks for; 0 in the keyed order.
        packing: of documents into samples (--document-packing).
    """

    step: int
    sample: int
    seq_length: int
    split: str
    seed: int
    batch: BatchSchedule
    parts: tuple[Part, ...]
    megatron_samples: int = 0
    packing: str = "stream"

    def first_sample(self, step: int) -> int:
        """The first sample of the step after `step` finished ones."""
        return self.batch.advance(self.sample, step - self.step)

    def dataset(self, subset: int = 0) -> BlendedDataset | MegatronDataset | MegatronBlend:
        """The samples of this phase; held-out ones always in the keyed order.

        Args:
            subset: 0 training; 1 validation and 2 test, which always begin at their first sample.

        Raises:
            DataError: a corpus is gone, or is no longer what it was.
        """
        datasets, corpora = [], []
        for part in self.parts:
            corpus = IndexedDataset(part.prefix)
            ranges = split_ranges(self.split, len(corpus))
            corpora.append((corpus, ranges[subset]))
            start = part.position if subset == 0 else None
            datasets.append(
                GPTDataset(corpus, ranges[subset], self.seq_length, self.seed, part.name, start, self.packing)
            )
            if subset == 0 and datasets[-1].fingerprint() != part.fingerprint:
                rule = f"step {self.step + 1} and those after it were taken from it as it was ({part.fingerprint})"
                raise DataError(f"{part.prefix} has changed ({datasets[-1].fingerprint()})", rule, "restore it")
        if self.megatron_samples and subset == 0:
            shares = [float(Fraction(part.weight)) for part in self.parts if part.weight]
            return megatron_order.blend(corpora, shares or None, self.seq_length, self.seed, self.megatron_samples)
        weights = [Fraction(part.weight or part.tokens) for part in self.parts]
        return BlendedDataset(datasets, weights, self.sample if subset == 0 else 0)

    def positions(self, samples: int) -> dict[str, Position]:
        """Where each of its datasets stands when the run has consumed `samples` samples."""
        order = BlendOrder([Fraction(part.weight) for part in self.parts], [part.name for part in self.parts])
        return {
            part.name: part.position.advance(count, self.seq_length, part.tokens)
            for part, count in zip(self.parts, order.counts(samples - self.sample), strict=True)
        }


def first_phase(
    data_path: Sequence[str],
    split: str,
    seq_length: int,
    seed: int,
    batch: BatchSchedule,
    megatron_samples: int = 0,
    packing: str = "stream",
) -> Phase:
    """The phase that flags describe, at the beginning of all datasets. Without weights, datasets are mixed in
    proportion to their tokens (in best-fit packing, to their samples). An empty `data_path` stands for synthetic data.

    Raises:
        DataError: a bad blend, or a corpus that cannot be read.
    """
    pairs, parts = parse_data_path(data_path), []
    names = unique_names([prefix for _, prefix in pairs])
    for (weight, prefix), name in zip(pairs, names, strict=True):
        corpus = IndexedDataset(prefix)
        sequences = split_ranges(split, len(corpus))[0]
        dataset = GPTDataset(corpus, sequences, seq_length, seed, name, packing=packing)
        share = str(weight or "") if megatron_samples else str(weight or dataset.tokens)
        parts.append(Part(name, prefix, share, dataset.fingerprint(), dataset.tokens, Position(0, seq_length, 0)))
    return Phase(0, 0, seq_length, split, seed, batch, tuple(parts), megatron_samples, packing)


def go_on(stored: Sequence[Phase], wanted: Phase, step: int, samples: int, new_epoch: bool) -> tuple[Phase, ...]:
    """The phases of a run that goes on after `step` steps and `samples` samples as `wanted` says.

    Args:
        stored: its phases so far; none of a run that began elsewhere, whose data begins anew here.
        wanted: by the flags (`first_phase`).
        new_epoch: datasets whose corpus or sequence length changed begin a new epoch (`--start-new-epoch`).

    Raises:
        DataError: a corpus has changed, and `new_epoch` was not asked for; or anything in Megatron-LM's order has.
    """
    if not stored:
        return (dataclasses.replace(wanted, step=step, sample=samples),)
    last = stored[-1]
    if _same_data(last, wanted) and last.batch == wanted.batch:
        prefixes = {part.name: part.prefix for part in wanted.parts}  # files may have moved
        moved = tuple(dataclasses.replace(part, prefix=prefixes[part.name]) for part in last.parts)
        return (*stored[:-1], dataclasses.replace(last, parts=moved))
    if last.megatron_samples or wanted.megatron_samples:
        if not _same_data(last, wanted):
            rule = "Megatron-LM's order depends on the corpora, weights, length, seed, split and number of samples"
            fix = "use the flags of the run that began, or --finetune --data-order keyed to begin another"
            raise DataError("--data-order megatron with other data than the run so far", rule, fix)
        return (*stored, dataclasses.replace(wanted, step=step, sample=samples))
    past = _positions(stored, samples)
    parts = []
    for part in wanted.parts:
        before, position = past.get(part.name, (part, part.position))
        changed = before.fingerprint != part.fingerprint
        if changed and not new_epoch:
            raise DataError(
                f"{part.prefix} was {before.fingerprint} in the run so far and is now {part.fingerprint}",
                "a corpus that was appended to, rebuilt or split differently has another order of samples; so has one "
                "that is packed differently, or by best-fit for another --seq-length",
                "restore it, or begin a new epoch of it by --start-new-epoch",
            )
        cut_anew = new_epoch and position.slot != wanted.seq_length
        if changed or cut_anew or last.seed != wanted.seed:
            position = Position(position.epoch + (position.offset > 0), wanted.seq_length, 0)
        parts.append(dataclasses.replace(part, position=position))
    return (*stored, dataclasses.replace(wanted, step=step, sample=samples, parts=tuple(parts)))


def _same_data(last: Phase, wanted: Phase) -> bool:
    def facts(phase: Phase) -> tuple[Any, ...]:
        parts = [(part.name, part.weight, part.fingerprint) for part in phase.parts]
        order = parts if phase.megatron_samples else sorted(parts)
        return phase.seq_length, phase.seed, phase.split if parts else "", phase.megatron_samples, order

    return facts(last) == facts(wanted)


def _positions(stored: Sequence[Phase], samples: int) -> dict[str, tuple[Part, Position]]:
    """Each dataset that the run has read: as it was in its last phase, and where it stopped."""
    ends = [*(phase.sample for phase in stored[1:]), samples]
    return {
        part.name: (part, phase.positions(end)[part.name])
        for phase, end in zip(stored, ends, strict=True)
        for part in phase.parts
    }


def describe(phase: Phase) -> list[str]:
    """What a phase reads, in words: a line for it, and one for each dataset in the middle of an epoch."""
    batch = "-".join(map(str, sorted({phase.batch.sizes()[0], phase.batch.final})))
    shares = [Fraction(part.weight or part.tokens) for part in phase.parts]
    parts = zip(shares, phase.parts, strict=True)
    blend = " + ".join(f"{float(share / sum(shares)):.4g} {part.name}" for share, part in parts)
    if phase.megatron_samples:
        blend += f", in Megatron-LM's order of {phase.megatron_samples:,} samples"
    if phase.packing != "stream":
        blend += f", documents packed by {phase.packing}"
    lines = [f"from step {phase.step + 1}: {batch} samples a step, {phase.seq_length} tokens each, {blend or 'mock'}"]
    for part in phase.parts:
        position, rest = part.position, part.position.finishing(phase.seq_length, part.tokens)
        if position.offset:
            read = f"{position.offset:,} of {part.tokens:,} tokens"
            line = f"{part.name} goes on in epoch {position.epoch} after {read}"
            if position.slot != phase.seq_length:
                pieces = f"its last {rest:,} samples are put together of pieces of {position.slot} tokens"
                line += f"; {pieces}, as that epoch was cut (--start-new-epoch begins a new one instead)"
            lines.append(line)
    return lines


def to_json(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Phases as JSON values."""
    return [dataclasses.asdict(phase) for phase in phases]


def from_json(entries: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """The inverse of `to_json`."""
    phases = []
    for entry in entries:
        parts = tuple(Part(**{**part, "position": Position(**part["position"])}) for part in entry["parts"])
        phases.append(Phase(**{**entry, "batch": BatchSchedule(**entry["batch"]), "parts": parts}))
    return tuple(phases)


def read_checkpoint(path: str | Path) -> tuple[Phase, ...]:
    """The phases in a checkpoint's manifest, read as the JSON that it is.

    Args:
        path: a checkpoint, or a --save directory whose newest checkpoint `latest` names.

    Raises:
        DataError: there is none, or it stores no phases.
    """
    root = Path(path)
    latest = root / "latest"
    directory = root / latest.read_text().strip() if latest.is_file() else root
    try:
        return from_json(json.loads((directory / "manifest.json").read_bytes())["metadata"]["data"]["phases"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"a checkpoint stores the phases of its data in manifest.json ({type(error).__name__}: {error})"
        raise DataError(f"--load {path} cannot be used", rule, "name the --save directory of a run") from None
