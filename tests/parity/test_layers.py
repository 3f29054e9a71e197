"""Tensor-parallel layers on real ranks against torch.nn on one: outputs, gradients of inputs, weights and biases."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.data_parallel import sum_partial_
from megasp.model import ColumnParallelLinear, Factory, RowParallelLinear, VocabParallelEmbedding
from megasp.model.layers import ONE_RANK
from megasp.model.loss import linear_cross_entropy
from megasp.parallel_state import Axis
from megasp.parameters import placed
from tests.ranks import run_ranks

S, B, D, F, V = 8, 2, 12, 16, 24
FUSED = {"q": 16, "k": 4, "v": 4}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shard(x: Tensor, axis: Axis, split: bool, dim: int = 0) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank] if split else x


def fill(module: nn.Module) -> None:
    """Every tensor a function of its canonical name, biases too."""
    with torch.no_grad():
        for p in module.parameters():
            for piece, box in placed(p.pieces):  # type: ignore[attr-defined]
                p[box.slices] = random(*piece.shape, seed=sum(piece.name.encode()))[piece.box.slices]


def check_gradients(module: nn.Module, whole: Mapping[str, Tensor], axis: Axis) -> None:
    """Each piece's gradient, partial ones summed, is that part of the whole layer's."""
    parameters = list(module.parameters())
    sum_partial_(parameters, axis)
    for p in parameters:
        for piece, box in placed(p.pieces):  # type: ignore[attr-defined]
            got, want = p.grad[box.slices], whole[piece.name][piece.box.slices]  # type: ignore[index]
            torch.testing.assert_close(got, want, msg=lambda text, name=piece.name: f"{name}: {text}")


def reference(sizes: Mapping[str, int], inputs: int, bias: bool) -> dict[str, Tensor]:
    leaves = {f"{n}.weight": random(size, inputs, seed=sum(f"{n}.weight".encode())) for n, size in sizes.items()}
    if bias:
        leaves |= {f"{n}.bias": random(size, seed=sum(f"{n}.bias".encode())) for n, size in sizes.items()}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def grads(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def column(axis: Axis, sp: bool, bias: bool, outputs: int | dict[str, int], replicas: dict[str, int]) -> None:
    factory = Factory(dtype=torch.float64)
    layer = ColumnParallelLinear(
        D, outputs, axis, bias=bias, sequence_parallel=sp, replicas=replicas, factory=factory, name="one"
    )
    fill(layer)
    sizes = outputs if isinstance(outputs, dict) else {"one": outputs}
    leaves = reference(sizes, D, bias)
    full = random(S, B, D).requires_grad_()
    ys = [nn.functional.linear(full, leaves[f"{n}.weight"], leaves.get(f"{n}.bias")) for n in sizes]
    directions = [random(*y.shape, seed=i + 1) for i, y in enumerate(ys)]
    x = shard(full.detach(), axis, sp).clone().requires_grad_()
    y = layer(x)
    held = {n: (axis.size // replicas.get(n, 1), axis.rank // replicas.get(n, 1)) for n in sizes}
    mine = [part.chunk(held[n][0], -1)[held[n][1]] for n, part in zip(sizes, ys, strict=True)]
    torch.testing.assert_close(y, torch.cat(mine, -1))
    # A replica's consumer gives it a share of the gradient: rank r of n gives (r + 1) / (1 + ... + n).
    parts = []
    for n, direction in zip(sizes, directions, strict=True):
        copies = replicas.get(n, 1)
        share = (axis.rank % copies + 1) / (copies * (copies + 1) / 2)
        parts.append(direction.chunk(held[n][0], -1)[held[n][1]] * share)
    y.backward(torch.cat(parts, -1))
    sum((part * d).sum() for part, d in zip(ys, directions, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(x.grad, shard(full.grad, axis, sp))  # type: ignore[arg-type]
    check_gradients(layer, grads(leaves), axis)


def row(axis: Axis, sp: bool, bias: bool) -> None:
    layer = RowParallelLinear(
        F, D, axis, bias=bias, sequence_parallel=sp, factory=Factory(dtype=torch.float64), name="one"
    )
    fill(layer)
    leaves = reference({"one": D}, F, bias)
    full = random(S, B, F).requires_grad_()
    expected = nn.functional.linear(full, leaves["one.weight"], leaves.get("one.bias"))
    direction = random(S, B, D, seed=3)
    x = shard(full.detach(), axis, True, -1).clone().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, shard(expected, axis, sp), msg=lambda text: f"bias must be added once: {text}")
    y.backward(shard(direction, axis, sp))
    expected.backward(direction)
    torch.testing.assert_close(x.grad, shard(full.grad, axis, True, -1))  # type: ignore[arg-type]
    check_gradients(layer, grads(leaves), axis)


def embedding(axis: Axis, sp: bool) -> None:
    layer = VocabParallelEmbedding(V, D, axis, sequence_parallel=sp, factory=Factory(dtype=torch.float64), name="one")
    fill(layer)
    weight = reference({"one": V}, D, False)["one.weight"]
    tokens = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(0))
    tokens[0], tokens[1] = 0, V - 1  # both ends of the vocabulary
    expected, direction = nn.functional.embedding(tokens, weight), random(S, B, D, seed=4)
    y = layer(tokens)
    torch.testing.assert_close(y, shard(expected, axis, sp))
    y.backward(shard(direction, axis, sp))
    expected.backward(direction)
    check_gradients(layer, {"one.weight": weight.grad}, axis)  # type: ignore[dict-item]


def head(axis: Axis, sp: bool) -> None:
    """The vocab-parallel loss, its gradients, and labels on every rank's part of the vocabulary; a masked-out shard."""
    full, weight = random(S, B, D).requires_grad_(), random(V, D, seed=1).requires_grad_()
    labels = torch.arange(S * B).view(S, B) * 5 % V
    mask = (torch.arange(S * B).view(S, B) % 3 > 0).double()
    mask[: S // axis.size] = 0
    expected = linear_cross_entropy(full, weight, labels, mask, ONE_RANK)
    (expected * 0.5).backward()
    x = shard(full.detach(), axis, sp).clone().requires_grad_()
    w = shard(weight.detach(), axis, True).clone().requires_grad_()
    loss = linear_cross_entropy(x, w, labels, mask, axis, sp)
    (loss * 0.5).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, shard(full.grad, axis, sp))  # type: ignore[arg-type]
    torch.testing.assert_close(w.grad, shard(weight.grad, axis, True))  # type: ignore[arg-type]


def _all(tp: int) -> None:
    axis = parallel_state.build(Layout(tp=tp), torch.device("cpu")).tp
    for sp, bias in itertools.product([False, True], repeat=2):
        column(axis, sp, bias, F, {})
        column(axis, sp, bias, FUSED, {"k": tp, "v": tp // 2})
        row(axis, sp, bias)
    for sp in (False, True):
        embedding(axis, sp)
        head(axis, sp)
    _traffic(axis)


def _traffic(axis: Axis) -> None:
    """What Megatron's sequence parallelism costs: gather and gather again, scatter; without it one all-reduce."""
    linear = ColumnParallelLinear(D, F, axis, sequence_parallel=True, factory=Factory(dtype=torch.float64))
    axis.traffic.reset()
    linear(random(S // axis.size, B, D).requires_grad_()).sum().backward()
    nbytes = S * B * D * 8 * (axis.size - 1) // axis.size
    assert axis.traffic.calls == {"all_gather": 2, "reduce_scatter": 1}
    assert axis.traffic.bytes_sent == {"all_gather": 2 * nbytes, "reduce_scatter": nbytes}
    linear = ColumnParallelLinear(D, F, axis, factory=Factory(dtype=torch.float64))
    axis.traffic.reset()
    linear(random(S, B, D).requires_grad_()).sum().backward()
    assert axis.traffic.bytes_sent == {"all_reduce": 2 * nbytes}


@pytest.mark.parametrize("tp", [2, 4])
def test_layers_on_ranks(tp: int) -> None:
    run_ranks(_all, tp, tp)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sp", [True, False])
def test_one_rank_is_the_nn_counterpart(sp: bool, bias: bool) -> None:
    """Without any process group, bit for bit; sequence parallelism over one rank changes nothing."""
    x, tokens = random(S, B, D).float(), torch.arange(S * B).view(S, B)
    for kind in (ColumnParallelLinear, RowParallelLinear):
        layer = kind(D, F, bias=bias, sequence_parallel=sp)
        theirs = nn.Linear(D, F, bias=bias)
        theirs.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), theirs(x)), kind
    layer = VocabParallelEmbedding(V, D, sequence_parallel=sp)
    assert torch.equal(layer(tokens), nn.functional.embedding(tokens, layer.weight))
