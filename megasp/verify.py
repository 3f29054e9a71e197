"""`megasp verify`: does a layout train exactly as one process does?

Trains the same weights on the same data for some steps in one process and in each layout given, on CPU ranks of this
machine, and compares the loss, the gradient of every canonical tensor in every step, and every weight afterwards. A
difference is the largest absolute one in a tensor, relative to the tensor's largest value, or to a thousandth of the
model's largest where that is more (a key bias's gradient without rotary is zero but for rounding).
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megasp import log, parallel_state, verify_order
from megasp.config.flags import flag
from megasp.config.layout import Layout
from megasp.config.load import load, parser, to_yaml
from megasp.config.schema import SHARDING_STRATEGIES, Config
from megasp.config.validate import validate
from megasp.errors import ConfigError
from megasp.local_ranks import run_ranks
from megasp.parameters import Piece, placed
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader, resolve
from megasp.training.learning_rate import learning_rates
from megasp.training.step import accumulate_gradients, apply_gradients

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCES = {"fp64": 1e-9, "fp32": 2e-3}
"""Largest relative difference that counts as equal. Rounding makes 1e-13 in fp64; in fp32 Adam turns the rounding of
gradients near zero into visible differences of weights, so fp64 is the test and fp32 a check of the arithmetic."""
FP8_TOLERANCE = 2e-3
"""The same in fp64 where linear layers are in fp8, after one step: how an operand is split decides its scale, and with
it the rounding of its smallest values (seen: 2e-6 hybrid, 9e-4 e4m3)."""

DEFAULTS = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8, "group_query_attention": True,
    "num_query_groups": 4,
    "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
    "vocab_size": 512, "hidden_dropout": 0.1, "attention_dropout": 0.0, "seq_length": 32, "global_batch_size": 8,
    "train_iters": 1000, "lr": 1e-3, "mock_data": True, "num_workers": 0,
}  # fmt: skip
"""What is verified unless flags say otherwise: a small Llama with grouped queries and dropout."""


PIPELINE_FIELDS = (
    "pipeline_schedule",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Verification."""

    layout: tuple[str, ...] = flag(
        (), "layout to compare with one process, such as tp2-u2 or dp2-zero3; may be repeated"
    )
    steps: int = flag(3, "training steps to compare")
    dtype: str = flag("fp64", "precision to compute in", choices=tuple(TOLERANCES))
    collectives: bool = flag(
        False, "check instead that all ranks communicate in one order, without a cluster (fake process group)"
    )
    world: int | None = flag(None, "ranks of --collectives; the data-parallel size is what the layout leaves")
    tolerance: float | None = flag(
        None, "largest relative difference that passes; 1e-9 for fp64, 2e-3 for fp32 and for fp8"
    )


Held = list[tuple[int, Piece, Tensor]]
"""What a rank holds: step, box of a canonical tensor, values."""


@dataclass(frozen=True)
class Worst:
    """Largest relative differences from one process; with gradient and weight the name of the tensor that has it."""

    loss: float
    gradient: tuple[float, str]
    weight: tuple[float, str]

    @property
    def overall(self) -> float:
        return max(self.loss, self.gradient[0], self.weight[0])


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command; exit status 1 when a layout differs."""
    flags = parser(prog, __doc__ or "", [Options])
    *_, options, _ = load(argv, flags, Options, DEFAULTS)
    layouts = [Layout.parse(name) for name in options.layout]
    config, source, _, notes = load(argv, flags, Options, _defaults(layouts, options.collectives))
    if source.print_config:
        print(to_yaml(config), end="")
        return 0
    if not layouts:
        raise ConfigError(
            "no --layout", "there must be one to compare with", "add for example --layout tp2-u2 --layout u4"
        )
    notes.append("layouts, precision and steps are the command's own flags; nothing is loaded or saved")
    for note in notes:
        log.info(note)
    if options.collectives:
        return _check_order(resolve(config), layouts, options.world)
    if options.world:
        raise ConfigError("--world without --collectives", "values are compared on real ranks", "add --collectives")
    if config.fp8.fp8_format and options.steps > 1:
        log.info("with fp8 the smallest difference of weights may round a value the other way: compare --steps 1")
    tolerance = options.tolerance or max(TOLERANCES[options.dtype], FP8_TOLERANCE if config.fp8.fp8_format else 0.0)
    log.info(f"reference: one process, {options.steps} steps in {options.dtype}; tolerance {tolerance:g}")
    failed = []
    for layout, worst in compare(resolve(config), layouts, options.steps, options.dtype):
        passed = worst.overall <= tolerance
        failed += [] if passed else [layout.name]
        log.info(
            f"{layout.name:20} {'ok' if passed else 'DIFFERS':8} loss {worst.loss:.1e}"
            f" | gradients {worst.gradient[0]:.1e} ({worst.gradient[1]})"
            f" | weights {worst.weight[0]:.1e} ({worst.weight[1]})"
        )
    log.info(f"DIFFERENT: {', '.join(failed)}" if failed else "every layout trains as one process does")
    return 1 if failed else 0


def _defaults(layouts: Sequence[Layout], collectives: bool) -> dict[str, Any]:
    """`DEFAULTS`, with layers enough for two stages on every pipeline rank."""
    layers = max([2, *(2 * layout.pp for layout in layouts if layout.pp > 1)])
    return DEFAULTS | (verify_order.DEFAULTS if collectives else {}) | {"num_layers": layers}


def _check_order(config: Config, layouts: Sequence[Layout], world_size: int | None) -> int:
    """Check the order of communication of each layout; exit status 1 when one would hang."""
    failed = 0
    for layout in layouts:
        here = in_layout(config, layout)
        filled = validate(here, world_size or layout.world_size)
        try:
            log.info(verify_order.check(here, filled))
        except verify_order.OrderError as error:
            failed += 1
            log.info(f"{filled.name:20} HANGS  {error}")
    return 1 if failed else 0


def compare(
    config: Config, layouts: Sequence[Layout], steps: int = 3, dtype: str = "fp64", reference: Config | None = None
) -> Iterator[tuple[Layout, Worst]]:
    """Each layout with its differences from one process, as they are found.

    Args:
        reference: what the one process runs; `config` without it.
    Raises:
        ConfigError: before anything runs, when a layout cannot run this configuration.
    """
    configs = [in_layout(config, layout) for layout in layouts]
    layouts = [validate(each, layout.world_size) for each, layout in zip(configs, layouts, strict=True)]
    with tempfile.TemporaryDirectory(prefix="megasp-verify-") as folder:
        file = Path(folder, "reference.pt")
        limit = 600.0 if config.kernels.compile else 120.0
        run_ranks(_record, 1, in_layout(reference or config, Layout()), steps, dtype, file, timeout=limit)
        for each, layout in zip(configs, layouts, strict=True):
            ranks = run_ranks(_difference, layout.world_size, each, layout, steps, dtype, file, timeout=limit)
            yield layout, Worst(*(max(getattr(r, part) for r in ranks) for part in ("loss", "gradient", "weight")))


def in_layout(config: Config, layout: Layout) -> Config:
    """The same run in another layout; options of an axis only where there is one.

    A layout without a ZeRO stage keeps the configuration's.
    """
    no_pipeline: dict[str, Any] = dict.fromkeys(PIPELINE_FIELDS) if layout.pp == 1 else {}
    zero = layout.zero or config.parallel.zero_stage
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        ulysses_size=layout.ulysses,
        ring_size=layout.ring,
        context_parallel_size=None,
        nproc_per_node=None,
        cp_comm_type=config.parallel.cp_comm_type if layout.ring > 1 else None,
        ulysses_head_chunks=config.parallel.ulysses_head_chunks if layout.ulysses > 1 else 1,
        sequence_parallel=config.parallel.sequence_parallel and layout.tp > 1,
        data_parallel_sharding_strategy=SHARDING_STRATEGIES[zero],
        use_distributed_optimizer=False,
        num_distributed_optimizer_instances=layout.dp_outer,
        **no_pipeline,
    )
    return dataclasses.replace(config, parallel=parallel)


def _record(config: Config, steps: int, dtype: str, file: Path) -> None:
    """Train in one process and keep every loss, gradient and weight, by canonical name."""
    trace = _train(config, Layout(), steps, dtype)
    torch.save(trace, file)


def _difference(config: Config, layout: Layout, steps: int, dtype: str, file: Path) -> Worst:
    """Train on this rank of `layout`, and compare what it holds with the reference's same boxes."""
    losses, gradients, weights = _train(config, layout, steps, dtype)
    want_losses, want_gradients, want_weights = torch.load(file, weights_only=False)
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, want_losses, strict=True))
    return Worst(loss, _largest(gradients, want_gradients), _largest(weights, want_weights))


def _largest(held: Held, reference: Held) -> tuple[float, str]:
    """The largest relative difference of a held box from the reference, and the tensor's name."""
    whole = {(label, piece.name): tensor for label, piece, tensor in reference}
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    worst = (0.0, "all equal")
    for label, piece, tensor in held:
        want = whole[label, piece.name]
        scale = want.abs().max().clamp(min=1e-3 * largest)
        difference = (tensor - want[piece.box.slices]).abs().max() / scale
        # NaN compares false with everything: it must not pass for a small difference.
        worst = max(worst, (float(difference.nan_to_num(math.inf)), piece.name))
    return worst


def _train(config: Config, layout: Layout, steps: int, dtype: str) -> tuple[list[float], Held, Held]:
    """Train on this rank: losses of the steps, all gradients of every step, and the weights after the last."""
    state = parallel_state.build(layout, torch.device("cpu"))
    training = build(config, state, DTYPES[dtype])
    masters = training.replicas.masters
    losses: list[float] = []
    gradients: Held = []
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        for step in range(steps):
            done = config.training.done(step, loader.consumed_samples)
            losses.append(accumulate_gradients(training, loader.step())[0])
            gradients += [item for p in masters for item in _boxes(step, p, p.grad)]
            apply_gradients(training, *learning_rates(done, config.optimizer, config.training.length))
    return losses, gradients, [item for p in training.optimizer.masters for item in _boxes(0, p, p.data)]


def _boxes(label: int, parameter: nn.Parameter, values: Tensor | None) -> Held:
    """Each piece of a parameter with its values."""
    assert values is not None
    return [(label, piece, values[local.slices].clone()) for piece, local in placed(parameter.pieces)]  # type: ignore[attr-defined]
