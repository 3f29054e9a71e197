"""megasp as a library: the public names run by themselves, and what their docstrings show runs as it stands there."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasp import model, parallel_state, sequence_parallel
from megasp.data import IndexedDataset, IndexedDatasetBuilder
from megasp.model import ColumnParallelLinear, GPTModel, ModelConfig, RowParallelLinear, VocabParallelEmbedding
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import UlyssesAttention, attend


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    yield
    parallel_state.destroy_model_parallel()


def example(thing: Any, after: str = r"\s+Example:") -> list[str]:
    """The lines of code that a docstring shows."""
    lines = inspect.cleandoc(thing.__doc__).splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(after, " " + line)) + 1
    block = []
    for line in lines[start:]:
        if line and not line.startswith("    "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block)).strip().splitlines()


NAMES: dict[str, Any] = {
    "torch": torch, "attend": attend, "state": ParallelState.single(), "ModelConfig": ModelConfig,
    "GPTModel": GPTModel, "ColumnParallelLinear": ColumnParallelLinear, "UlyssesAttention": UlyssesAttention,
    "RowParallelLinear": RowParallelLinear, "VocabParallelEmbedding": VocabParallelEmbedding,
    "q": torch.randn(4, 1, 4, 8), "k": torch.randn(4, 1, 2, 8), "v": torch.randn(4, 1, 2, 8),
}  # fmt: skip


SHOWN = [GPTModel, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, UlyssesAttention]


@pytest.mark.parametrize("thing", SHOWN, ids=lambda t: t.__name__)
def test_docstring_examples_run(thing: Any) -> None:
    code = example(thing)
    names = dict(NAMES)
    exec("\n".join(code[:-1]), names)
    last = eval(code[-1].split("#")[0].split("=", 1)[1] if re.match(r"\w+ = ", code[-1]) else code[-1], names)
    assert last is not False, f"{code[-1]} is not true"
    if thing is GPTModel:
        assert last.shape == (2, 16, 1024), "as its comment says"
        last.sum().backward()


def test_parallel_state_as_its_docstring_shows() -> None:
    """In one process, where the sizes of two are one."""
    code = example(parallel_state, r".*Megatron-LM's names:")
    assert len(code) >= 4 and "tensor_model_parallel_size=2" in code[1]
    names: dict[str, Any] = {}
    exec("\n".join(code).replace("=2", "=1"), names)
    assert isinstance(names["state"], ParallelState) and not parallel_state.model_parallel_is_initialized()


def test_layers_by_themselves() -> None:
    x = torch.randn(4, 2, 8, requires_grad=True)
    tokens = torch.randint(10, (4, 2))
    y = (
        RowParallelLinear(8, 6)(ColumnParallelLinear(8, {"a": 4, "b": 4})(x)).sum()
        + VocabParallelEmbedding(10, 6)(tokens).sum()
    )
    y.backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_model_with_the_grid_of_the_library() -> None:
    state = parallel_state.initialize_model_parallel(backend="gloo")
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=10, max_position_embeddings=4)
    tokens = torch.randint(10, (1, 4))
    logits = GPTModel(config, state)(tokens)
    assert logits.shape == (1, 4, 128) and torch.equal(logits, GPTModel(config)(tokens))


def test_indexed_dataset_by_itself(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "c", np.uint16) as builder:
        builder.add_document([5, 6, 7])
    assert IndexedDataset(tmp_path / "c")[0].tolist() == [5, 6, 7]


def test_public_names_are_documented() -> None:
    for module in (model, sequence_parallel):
        for name in module.__all__:
            thing = getattr(module, name)
            assert inspect.getdoc(thing) and (inspect.getdoc(thing) or "").strip()[-1:] != "", name
    assert all(hasattr(parallel_state, name) for name in parallel_state.__all__)
