"""Any options together: a configuration is drawn over everything that says *how* to train (layout, ZeRO, schedule,
recompute, offload, tiles, precision, ...) and over *what* is trained. If `validate` accepts it, its steps must be those
of one process without any of the options; if not, the refusal is a `ConfigError`. Nothing else may be raised.

A new option is one line in `HOW`: its flag, its default, and its other values.
"""

import functools
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import Config
from megasp.config.validate import validate
from megasp.data_parallel import replicas
from megasp.errors import ConfigError
from megasp.model import loss, offload
from megasp.parallel_state import ParallelState
from megasp.training import host_optimizer
from megasp.training.build import build
from megasp.training.datasets import build_datasets, build_loader, resolve
from megasp.training.step import accumulate_gradients, apply_gradients
from megasp.verify import Held, _boxes, _largest
from tests.ranks import run_ranks

Values = dict[str, Any]

BASE: Values = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "group_query_attention": True,
    "vocab_size": 96, "make_vocab_size_divisible_by": 24, "mock_data": True, "train_iters": 4, "lr": 1e-3,
    "num_workers": 0, "eval_iters": 0, "max_position_embeddings": 48,
}  # fmt: skip
STEPS = 2


@dataclass(frozen=True)
class Option:
    """Values of a flag, the plainest first; a dict sets several flags.

    Attributes:
        when: where another value makes sense; elsewhere it is drawn seldom, to be refused.
    """

    values: tuple[Any, ...]
    when: Callable[[Layout, Values], Any] = lambda layout, drawn: True


def option(*values: Any, when: Callable[[Layout, Values], Any] | None = None) -> Option:
    return Option(values) if when is None else Option(values, when)


WHAT: dict[str, Option] = {
    "seq_length": option(24, 48, 20),
    "batch": option({"global_batch_size": 4}, {"global_batch_size": 8, "micro_batch_size": 2},
                    {"global_batch_size": 6}, {"global_batch_size": 12}),
    "num_query_groups": option(4, 1, 2, 8),
    "position_embedding_type": option("rope", "learned_absolute", "none"),
    "rotary": option({}, {"rotary_percent": 0.5}, {"rotary_scaling": "linear", "rotary_scaling_factor": 2.0},
                     when=lambda _, drawn: drawn["position_embedding_type"] == "rope"),
    "normalization": option("RMSNorm", "LayerNorm"),
    "mlp": option({"swiglu": True}, {"squared_relu": True}, {}),
    "add_bias_linear": option(False, True),
    "add_qkv_bias": option(False, True),
    "qk_layernorm": option(False, True),
    "untie_embeddings_and_output_weights": option(False, True),
    "hidden_dropout": option(0.0, 0.1),
    "attention_dropout": option(0.0, 0.1),
    "window": option({}, {"window_size": 5}, {"window_size": 7, "attention_sinks": 2}),
    "documents": option({}, {"reset_attention_mask": True}, {"reset_attention_mask": True, "reset_position_ids": True}),
    "eod": option({}, {"tokenizer_type": "NullTokenizer", "vocab_size": 95, "eod_mask_loss": True}),
    "clip_grad": option(1.0, 0.0, 0.01),
}  # fmt: skip
"""What is trained. These hold for the plain run, too."""

HOW: dict[str, Option] = {
    "sequence_parallel": option(False, True, when=lambda at, _: at.tp > 1),
    "data_parallel_sharding_strategy": option("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "use_distributed_optimizer": option(False, True),
    "num_distributed_optimizer_instances": option(
        1, 2, when=lambda at, drawn: at.dp % 2 == 0 and drawn["data_parallel_sharding_strategy"] != "no_shard"),
    "pipeline_schedule": option(None, "gpipe", "1f1b", "zb-h1", "zbv", "interleaved", when=lambda at, _: at.pp > 1),
    "num_virtual_stages_per_pipeline_rank": option(
        None, 2, when=lambda at, drawn: at.pp > 1 and drawn["pipeline_schedule"] in (None, "interleaved", "zbv")),
    "pipeline_model_parallel_layout": option(
        None, "Et|tttL", "E|tt|tt|L", "Ett|t|tL", when=lambda at, _: at.pp > 1),
    "decoder_first_pipeline_num_layers": option(None, 1, when=lambda at, _: at.pp > 1),
    "decoder_last_pipeline_num_layers": option(None, 1, when=lambda at, _: at.pp > 1),
    "cp_comm_type": option(None, "p2p", "all_gather", "lightseq", when=lambda at, _: at.ring > 1),
    "ulysses_head_chunks": option(1, 2, when=lambda at, _: at.ulysses > 1),
    "recompute_granularity": option(None, "full", "selective", "all-but-attention"),
    "recompute_method": option(
        None, "uniform", "block", "alternate", when=lambda _, drawn: drawn["recompute_granularity"]),
    "recompute_num_layers": option(None, 2, when=lambda _, drawn: drawn["recompute_granularity"]),
    "recompute_modules": option(
        (), ("core_attn",), ("mlp",), ("layernorm", "mlp_act"), ("core_attn", "layernorm", "mlp"),
        when=lambda _, drawn: drawn["recompute_granularity"] == "selective"),
    "distribute_saved_activations": option(
        False, True, when=lambda at, drawn: at.tp > 1 and not drawn["sequence_parallel"]
        and drawn["recompute_granularity"] in ("full", "all-but-attention")),
    "offload": option(
        {}, {"cpu_offloading_activations": True},
        {"cpu_offloading_activations": True, "cpu_offloading_num_layers": 1}),
    "tiled_mlp": option(1, 2, 5),
    "attention_backend": option("auto", "unfused"),
    "weight_gradient_dtype": option("auto", "fp32", "compute"),
    "host": option(
        {}, {"optimizer_cpu_offload": True}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
        {"optimizer_cpu_offload": True, "cpu_offloading_weights": True}),
    "chunks": option(
        {}, {"sequence_chunks": 2}, {"sequence_chunks": 4},
        {"sequence_chunks": 2, "cpu_offloading_activations": True, "cpu_offloading_attention": True}),
}  # fmt: skip
"""How it is trained: all that must not change it."""

SIZES: dict[str, Option] = {
    "loss.CHUNK_BYTES": option(loss.CHUNK_BYTES, 9000),
    "replicas.BUCKET_ELEMENTS": option(replicas.BUCKET_ELEMENTS, 3000),
    "host_optimizer.BUCKET_ELEMENTS": option(host_optimizer.BUCKET_ELEMENTS, 3000),
}
"""Sizes that are no flags, which a small model would never reach: names in their modules."""

PRECISIONS: dict[str, tuple[Values, torch.dtype, float]] = {
    "fp64": ({}, torch.float64, 1e-9),
    "fp32": ({}, torch.float32, 1e-4),
    "bf16": ({"bf16": True}, torch.bfloat16, 0.08),
    "bf16 gradients": ({"bf16": True, "grad_reduce_in_bf16": True}, torch.bfloat16, 0.08),
    "fp16": ({"fp16": True, "initial_loss_scale": 1024.0}, torch.float16, 0.02),
}
"""Name -> flags, the dtype that is computed in, and the largest relative difference: of any tensor in fp64, where it is
a test of everything; in lower precision of the loss and of all gradients of the first step together."""

MODULES = {"loss": loss, "replicas": replicas, "host_optimizer": host_optimizer}


@dataclass(frozen=True)
class Combination:
    """What was drawn: layout (without ZeRO, which is an option), precision, flags, and sizes."""

    layout: Layout
    precision: str
    what: Values
    how: Values
    sizes: dict[str, int]

    @property
    def given(self) -> Values:
        """The flags of the whole run."""
        layout = self.layout
        axes = {
            "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
            "ulysses_size": layout.ulysses, "ring_size": layout.ring,
        }  # fmt: skip
        return BASE | self.what | axes | self.how | PRECISIONS[self.precision][0]

    @property
    def said(self) -> str:
        """What differs from the plainest values, to run it again by hand."""
        plain = {name: each.values[0] for table in (WHAT, HOW) for name, each in table.items()}
        options = {k: v for k, v in (self.what | self.how).items() if k not in plain or plain[k] != v}
        return f"{self.precision} on {self.layout.name}: {options} {self.sizes}"

    @property
    def plain(self) -> Config:
        """The same training in one process, with no option."""
        return resolve(from_values(BASE | self.what | PRECISIONS[self.precision][0]))


def layouts(most: int) -> list[Layout]:
    """Of at most so many ranks."""
    axes = itertools.product(range(1, most + 1), repeat=5)
    return [Layout(pp, 1, *sizes) for pp, *sizes in axes if pp * math.prod(sizes) <= most]


def drawn(seed: int, ranks: int) -> Combination:
    """A layout of up to `ranks` ranks, and of every option its plainest value or, more rarely, another one."""
    random = Random(seed)
    layout = random.choice(layouts(ranks))

    def flags(table: dict[str, Option], share: float) -> Values:
        chosen: Values = {}
        for name, each in table.items():
            other = random.random() < (share if each.when(layout, chosen) else 0.01)
            value = random.choice(each.values[1:]) if other else each.values[0]
            chosen |= value if isinstance(value, dict) else {name: value}
        return chosen

    precision = random.choice(["fp64"] * 8 + list(PRECISIONS))
    what = flags(WHAT, 0.35)
    return Combination(layout, precision, what, flags(HOW, 0.25), flags(SIZES, 0.3))


@dataclass(frozen=True)
class Trace:
    """Of some steps on one rank: losses, global gradient norms, gradients, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    gradients: Held
    weights: Held


def accepted(combination: Combination) -> tuple[Config, Layout]:
    """The configuration that is to train, and its layout with what was left open filled in.

    Raises:
        ConfigError: the combination is refused.
    """
    how = combination.how
    wants_offload = how.get("cpu_offloading_activations") or how.get("optimizer_cpu_offload")
    config = resolve(from_values(combination.given))
    # Offloading is refused on a CPU for it gains nothing; plain copies stand in for it here.
    return config, validate(config, combination.layout.world_size, "cuda" if wants_offload else "cpu")


def check(combination: Combination) -> None:
    """Train it beside the plain run, or see it refused.

    Raises:
        AssertionError: it trains otherwise.
    """
    try:
        config, filled = accepted(combination)
    except ConfigError as refusal:
        assert refusal.got and refusal.rule and refusal.fix, refusal
        return
    reference = _plain(combination.plain, combination.precision)
    differences = run_ranks(_difference, filled.world_size, config, filled, combination, reference)
    tolerance = PRECISIONS[combination.precision][2]
    for rank, found in enumerate(differences):
        wrong = {name: value for name, value in found.items() if not value <= tolerance}
        assert not wrong, f"rank {rank} of {filled.name} differs: {wrong}"


@functools.lru_cache(maxsize=16)
def _plain(config: Config, precision: str) -> bytes:
    """The plain run's trace, in bytes: tensors would go to the ranks by a file descriptor each."""
    file = io.BytesIO()
    torch.save(_train(config, ParallelState.single(), PRECISIONS[precision][1]), file)
    return file.getvalue()


def _train(config: Config, state: ParallelState, dtype: torch.dtype) -> Trace:
    training = build(config, state, dtype)
    trace = Trace([], [], [], [])
    with build_loader(config, state, training.shards, build_datasets(config).train) as loader:
        for step in range(STEPS):
            trace.losses.append(accumulate_gradients(training, loader.step())[0])
            trace.gradients.extend(item for p in training.replicas.masters for item in _boxes(step, p, p.grad))
            trace.norms.append(apply_gradients(training, 1e-3))
    trace.weights.extend(item for p in training.optimizer.masters for item in _boxes(0, p, p.data))
    return trace


def _difference(config: Config, layout: Layout, combination: Combination, plain: bytes) -> dict[str, float]:
    """Train on this rank, and compare what it holds with the plain run's."""
    reference = torch.load(io.BytesIO(plain), weights_only=False)
    state = parallel_state.build(layout, torch.device("cpu"))
    with mock.patch.object(offload.Offload.__init__, "__defaults__", (256,)):
        for name, size in combination.sizes.items():
            module, attribute = name.split(".")
            setattr(MODULES[module], attribute, size)  # in this rank's own process
        trace = _train(config, state, PRECISIONS[combination.precision][1])
    pairs = {"loss": (trace.losses, reference.losses), "norm": (trace.norms, reference.norms)}
    if combination.precision != "fp64":
        first = [item for item in trace.gradients if item[0] == 0]
        pairs = {name: (ours[:1], theirs[:1]) for name, (ours, theirs) in pairs.items()}
    found = {
        name: max(abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a) else math.inf for a, b in zip(*both, strict=True))
        for name, both in pairs.items()
    }
    if combination.precision == "fp64":
        for name, ours, theirs in (("gradient", trace.gradients, reference.gradients),
                                   ("weight", trace.weights, reference.weights)):  # fmt: skip
            worst, tensor = _largest(ours, theirs)
            found[f"{name} of {tensor}"] = worst
    else:
        found["gradients"] = _together(first, reference.gradients)
    return found


def _together(held: Held, reference: Held) -> float:
    """The norm of all differences, relative to the norm of all the same boxes of the reference."""
    whole = {(label, piece.name): tensor.double() for label, piece, tensor in reference}
    want = [whole[label, piece.name][piece.box.slices] for label, piece, _ in held]
    difference = _norm([tensor.double() - w for (*_, tensor), w in zip(held, want, strict=True)])
    return difference / max(_norm(want), 1e-30)


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
