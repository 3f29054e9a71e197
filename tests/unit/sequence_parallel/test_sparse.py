"""Sparse attention by a mask function against the definition, tile by tile and by FlexAttention's eager form."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megasp.errors import ConfigError
from megasp.parallel_state import Axis, ParallelState
from megasp.sequence_parallel import Mask, SequenceAttention, SparseMask, Work, attend, sparse_attend
from megasp.sequence_parallel.block_kernels import AttentionDropout
from megasp.sequence_parallel.sparse import _block_mask, _flex
from tests.reference_attention import visible

LENGTH, H = 40, 8


def strided(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A pattern of each head's own."""
    return (key <= query) & ((query - key < 5) | (key % 7 == head))


def window(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (query - key <= 5)


def nothing_first(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Queries up to 20 see no key, and no query sees its own."""
    return (key < query) & (query > 20)


def inputs(heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(LENGTH, 2, n, H, generator=generator).double() for n in (heads, kv_heads, kv_heads, heads)]


def definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """seen bool [B, N, S, S]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("ibnh,jbnh->bnij", q, k) * H**-0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bnij,jbnh->ibnh", probabilities, v)


def seen_by(function: Any, starts: list[np.ndarray] | None) -> Tensor:
    i = torch.arange(LENGTH)
    seen = function(torch.arange(4)[:, None, None], i[:, None], i).expand(4, LENGTH, LENGTH)
    same = [visible(LENGTH, Mask(), row.tolist()) for row in starts or [np.array([0])] * 2]
    return torch.stack([seen & (document | document.t()) for document in same])


def run(function: Any, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


@pytest.mark.parametrize("documents", [None, [np.array([0, 1, 17]), np.array([0])]], ids=["one", "documents"])
@pytest.mark.parametrize("function", [strided, window])
@pytest.mark.parametrize("tile", [8, 16, 128])
def test_tiles_are_the_definition(function: Any, documents: list[np.ndarray] | None, tile: int) -> None:
    given, work = inputs(), Work((((0, LENGTH),),), documents=documents)
    ours = run(partial(sparse_attend, work=work, mask=SparseMask(function, tile)), given)
    want = run(partial(definition, seen=seen_by(function, documents)), given)
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)


def test_a_window_is_the_window_of_attend() -> None:
    q, k, v, _ = inputs()
    out, lse = sparse_attend(q, k, v, mask=SparseMask(window, 8))
    want, want_lse = attend(q, k, v, Work((((0, LENGTH),),), Mask(5)))
    torch.testing.assert_close((out, lse), (want, want_lse), atol=1e-13, rtol=0)


def test_rows_that_see_nothing() -> None:
    given = inputs()
    out, *gradients = run(partial(sparse_attend, mask=SparseMask(nothing_first, 8)), given)
    assert (out[:21] == 0).all() and (gradients[0][:21] == 0).all()
    assert all(x.isfinite().all() for x in gradients)
    assert (sparse_attend(*given[:3], mask=SparseMask(nothing_first, 8))[1][..., :21] == -torch.inf).all()


def test_only_visible_tiles_are_computed() -> None:
    mask = SparseMask(window, 8)
    assert [len(keys) for keys in mask.keys_of_rows(4, LENGTH)] == [8, 16, 16, 16, 16]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("documents", [None, [np.array([0, 17]), np.array([0])]], ids=["one", "documents"])
def test_flex_attention_gets_the_same_mask(documents: list[np.ndarray] | None) -> None:
    """Its eager forward, which a CPU has, too; heads 2 and 3 of 4."""
    (q, k, v, _), mask = (x.float() for x in inputs(2, 1)), SparseMask(strided, 8).for_heads(2)
    work = Work((((0, LENGTH),),), documents=documents)
    ours = _flex(q, k, v, work, mask, 0.3, flex_attention)
    want = sparse_attend(q, k, v, work, mask=mask, scale=0.3)
    torch.testing.assert_close(ours, want, atol=2e-6, rtol=1e-4)
    [(of, made)] = mask.block_masks.values()
    assert of is work and _block_mask(q, work, mask) is made, "made once for all layers"
    assert _block_mask(q, Work(work.held), mask) is not made, "not for other documents"


def test_what_it_cannot_do_is_refused() -> None:
    q, k, v, _ = inputs()
    mask, state = SparseMask(strided), ParallelState.single()
    with pytest.raises(ConfigError, match="--attention-dropout: it has none"):
        sparse_attend(q, k, v, mask=mask, dropout=AttentionDropout(0.1, lambda *_: q, q))
    with pytest.raises(ConfigError, match="all-but-attention"):
        sparse_attend(q, k, v, mask=mask, kept=object())
    with pytest.raises(ConfigError, match="with --window-size"):
        SequenceAttention(state, mask=Mask(4), sparse=mask)
    with pytest.raises(ConfigError, match="attention-backend flash"):
        SequenceAttention(state, backend="flash", sparse=mask)
    state.axes["ring"] = Axis("ring", 2)
    with pytest.raises(ConfigError, match="ring-size 2"):
        SequenceAttention(state, shards=object(), sparse=mask)  # type: ignore[arg-type]


def test_in_a_model() -> None:
    """A function that says what causal attention does trains the same model."""
    from megasp.model import GPTModel, ModelConfig

    config = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=10, max_position_embeddings=8,
        attention_dropout=0.0,
    )  # fmt: skip
    tokens = torch.randint(10, (2, 8))
    sparse = SparseMask(lambda head, query, key: key <= query, tile=4)
    logits = GPTModel(config, attend=SequenceAttention(ParallelState.single(), sparse=sparse))(tokens)
    torch.testing.assert_close(logits, GPTModel(config)(tokens), atol=1e-5, rtol=1e-4)
