"""Initial weights: a function of (seed, canonical name, place) alone, so every layout starts from the same model and
a rank draws no more than it holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megasp.config.layout import AXES, UNIONS, Layout
from megasp.config.schema import ModelConfig
from megasp.model import Factory, GPTModel, init
from megasp.model.init import initial_values
from megasp.parallel_state import Axis, ParallelState
from megasp.parameters import Box, Piece, placed, split, whole
from tests.unit.property import sample

SHAPE = (600, 270)
STD = {"init_std": 0.5, "init_mean": 0.25}
WHOLE = initial_values(whole("w", SHAPE).with_facts(**STD), 7)


def piece(start: tuple[int, ...], size: tuple[int, ...], name: str = "w") -> Piece:
    return Piece(name, SHAPE, Box(start, size), **STD)


@sample(25)
@given(st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, 300)) for n in SHAPE)))
def test_any_box_is_the_slice_of_the_whole(spans: tuple[tuple[int, int], ...]) -> None:
    start = tuple(a for a, _ in spans)
    size = tuple(min(n, limit - a) for (a, n), limit in zip(spans, SHAPE, strict=True))
    held = piece(start, size)
    assert torch.equal(initial_values(held, 7), WHOLE[held.box.slices])


def test_distribution() -> None:
    assert WHOLE.dtype == torch.float32 and WHOLE.shape == SHAPE
    assert abs(WHOLE.mean() - 0.25) < 0.005 and abs(WHOLE.std() - 0.5) < 0.005
    standard = (WHOLE - 0.25) / 0.5
    assert abs((standard.abs() < 1).float().mean() - 0.6827) < 0.005, "not normal"
    rows, columns = (np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1] for x in (WHOLE.numpy(), WHOLE.t().numpy()))
    assert abs(rows) < 0.01 and abs(columns) < 0.01, "neighbours are correlated"


def test_seed_name_and_tile_matter() -> None:
    first = piece((0, 0), (256, 256))
    drawn = initial_values(first, 7)
    assert torch.equal(drawn, initial_values(first, 7))
    others = [initial_values(first, 8), initial_values(piece((0, 0), (256, 256), "v"), 7), WHOLE[256:512, :256]]
    assert all((drawn != other).float().mean() > 0.99 for other in others)


def test_values_do_not_change_between_versions() -> None:
    """A checkpoint stores no initial weights, but `--seed` promises them."""
    first = [0.002796366810798645, 1.0749249458312988, 0.3435192108154297]
    assert initial_values(piece((0, 0), (1, 3)), 7).flatten().tolist() == pytest.approx(first, rel=1e-6)
    assert initial_values(piece((599, 269), (1, 1)), 7).item() == pytest.approx(-0.491637647151947, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "size", "tiles"),
    [
        ((0, 0), (1, 1), 1),
        ((0, 0), (256, 256), 1),
        ((255, 255), (2, 2), 4),
        ((256, 0), (256, 270), 2),
        ((0, 0), SHAPE, 6),
        ((512, 256), (88, 14), 1),
    ],
)
def test_only_touched_tiles_are_drawn(
    start: tuple[int, ...], size: tuple[int, ...], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    original = init._tile
    monkeypatch.setattr(init, "_tile", lambda *key: drawn.append(key) or original(*key))
    initial_values(piece(start, size), 7)
    assert len(drawn) == len(set(drawn)) == tiles


def test_constants_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(init, "_tile")
    assert initial_values(whole("norm", (5,)).with_facts(init_mean=1.0), 7).tolist() == [1.0] * 5
    parameter = Factory().parameter([whole("bias", (3,))])
    assert parameter.tolist() == [0.0] * 3 and isinstance(parameter, nn.Parameter)


def test_meta_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(init, "_tile")
    parameter = Factory("meta").parameter([whole("w", (10**6, 10**5)).with_facts(init_std=1.0)])
    assert parameter.device.type == "meta" and parameter.pieces[0].name == "w"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_round_the_same_values(dtype: torch.dtype) -> None:
    pieces = [split("q", (8, 4), 1, 2).with_facts(init_std=1.0), whole("k", (2, 4)).with_facts(init_std=1.0)]
    exact, other = (Factory(dtype=d, seed=3).parameter(pieces).data for d in (torch.float32, dtype))
    assert other.dtype == dtype and torch.equal(other, exact.to(dtype))


# Whole models, cut by tensor parallelism. Constructors do not communicate, so ranks need no process group.


def state(tp: int, rank: int) -> ParallelState:
    axes = {name: Axis(name) for name in (*AXES, *UNIONS)}
    axes |= {name: Axis(name, tp, rank) for name in ("tp", "pp_tp")}
    return ParallelState(Layout(tp=tp), rank, torch.device("cpu"), axes)


def models() -> Iterator[tuple[str, ModelConfig, bool]]:
    llama: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 8, "vocab_size": 300}
    llama |= {"ffn_hidden_size": 48, "max_position_embeddings": 10}
    yield "llama", ModelConfig(**llama, num_query_groups=2, swiglu=True, normalization="RMSNorm", qk_layernorm=True,
                               position_embedding_type="rope", add_bias_linear=False,
                               untie_embeddings_and_output_weights=True), True  # fmt: skip
    yield "gpt2", ModelConfig(**llama), False
    yield "multi-query with biases", ModelConfig(**llama, num_query_groups=1), True


@pytest.mark.parametrize(("config", "sequence_parallel"), [m[1:] for m in models()], ids=[m[0] for m in models()])
def test_every_tensor_parallel_size_starts_from_the_same_weights(config: ModelConfig, sequence_parallel: bool) -> None:
    reference: dict[str, torch.Tensor] = {}
    for parameter in GPTModel(config).parameters():
        for held, box in placed(parameter.pieces):  # type: ignore[attr-defined]
            assert held.box == whole("", held.shape).box and held.replicas == 1 and not held.partial
            assert held.name not in reference, "a canonical tensor is held once"
            reference[held.name] = parameter.data[box.slices]
    for tp in (2, 4, 8):
        covered = {name: torch.zeros_like(tensor) for name, tensor in reference.items()}
        replicas: dict[tuple[str, Box], list[int]] = {}
        for rank in range(tp):
            model = GPTModel(config, state(tp, rank), sequence_parallel=sequence_parallel)
            for parameter in model.parameters():
                for held, box in placed(parameter.pieces):  # type: ignore[attr-defined]
                    values = parameter.data[box.slices]
                    assert torch.equal(values, reference[held.name][held.box.slices]), (tp, rank, held.name)
                    covered[held.name][held.box.slices] += held.replica == 0
                    replicas.setdefault((held.name, held.box), []).append(held.replica)
                    assert len(replicas[held.name, held.box]) <= held.replicas
        for name, times in covered.items():
            assert (times == 1).all(), f"{name} is not owned exactly once with tp {tp}"
        assert all(sorted(r) == list(range(len(r))) for r in replicas.values()), "replicas are numbered"


def test_names_are_canonical() -> None:
    names = {p.name for parameter in GPTModel(next(models())[1]).parameters() for p in parameter.pieces}  # type: ignore[attr-defined]
    block = {f"attention.{part}.weight" for part in ("q", "k", "v", "o", "q_norm", "k_norm")}
    block |= {"input_norm.weight", "mlp_norm.weight", *(f"mlp.{part}.weight" for part in ("gate", "up", "down"))}
    assert names == {f"layers.0.{part}" for part in block} | {"embedding.weight", "head.weight", "final_norm.weight"}


def test_output_projections_start_smaller() -> None:
    """GPT-2's scaling by the depth of the residual stream; embeddings and the rest have the plain deviation."""
    config = ModelConfig(num_layers=8, hidden_size=128, num_attention_heads=4, vocab_size=256, init_method_std=0.1)
    spread = {p.pieces[0].name: p.std().item() for p in GPTModel(config).parameters() if p.dim() > 1}  # type: ignore[attr-defined]
    for name, std in spread.items():
        wanted = 0.025 if name.endswith((".o.weight", ".down.weight")) else 0.1
        assert std == pytest.approx(wanted, rel=0.05), name


def test_ranks_hold_their_share() -> None:
    config = next(models())[1]
    sizes = [sum(p.numel() for p in GPTModel(config, state(tp, 0)).parameters() if p.dim() > 1) for tp in (1, 2)]
    assert sizes[1] * 2 == sizes[0]
