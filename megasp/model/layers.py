"""Tensor-parallel linear layers and embedding (Megatron-LM, arXiv 1909.08053 section 3; sequence parallelism:
arXiv 2205.05198 section 4.2). Over an axis of one rank each is exactly its `nn` counterpart.

    column-parallel: each rank holds some output features     row-parallel: each rank holds some input features
        Y = [X W1^T, X W2^T]                                      Y = X1 W1^T + X2 W2^T

With sequence parallelism activations between the layers are split along dim 0 (the sequence): a column-parallel layer
gathers its input, a row-parallel one reduce-scatters its output, and neither keeps the gathered tensor.

Shapes: S sequence on this rank, B batch, `[S, B, features]`; T is the tensor-parallel size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megasp.collectives import (
    reduce_from,
    scatter_to,
    start_all_reduce,
    start_reduce_scatter,
)
from megasp.footprint import Part
from megasp.model.init import Factory
from megasp.model.products import FEATURES, GRADIENT, PLAIN, ROWS, WEIGHT, Operand, Products
from megasp.model.weight_gradients import WeightGradient, WeightGradients, gradient_dtype
from megasp.parallel_state import Axis
from megasp.parameters import Piece, split, whole

ONE_RANK = Axis("tp")


class _Linear(torch.autograd.Function):
    """y = x W^T + b. Saves of x what `products` keeps (of a shard, under sequence parallelism) and W.

    The backward gathers x again behind the input-gradient GEMM, and reduces the input's gradient behind the
    weight-gradient GEMM; or leaves the weight's gradient to the queue that is given, while that defers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        products: Products,
        axis: Axis,
        sequence_parallel: bool,
        queue: WeightGradients | None,
    ) -> Tensor:
        gather = axis if sequence_parallel else None
        left, by_rows = products.cast(x, FEATURES, ROWS, gather=gather)
        kept = products.kept(x, by_rows)
        ctx.save_for_backward(kept.values, kept.scale, weight)
        ctx.products, ctx.axis, ctx.gather, ctx.queue = products, axis, gather, queue
        ctx.parameter = weight  # where a deferred gradient goes: under recompute what is saved is a detached copy
        gathered = left.start_gather(gather)
        (right,) = products.cast(weight, FEATURES, of=WEIGHT)
        return products.multiply(gathered(), right.matrix, x.dtype, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, weight = ctx.saved_tensors
        products, axis, gather, kept = ctx.products, ctx.axis, ctx.gather, Operand(values, scale)
        wants_dx, wants_dw, wants_db, *_ = ctx.needs_input_grad
        left, by_rows = products.cast(dy, FEATURES, ROWS, of=GRADIENT)
        if wants_dw and ctx.queue is not None and ctx.queue.defers:
            ctx.queue.put(WeightGradient(ctx.parameter, kept, by_rows, products, gather))
            wants_dw = False
        gathered = products.restored(kept).start_gather(gather) if wants_dw else None
        dx = dw = None
        if wants_dx:
            (right,) = products.cast(weight, ROWS, of=WEIGHT)
            partial = products.multiply(left, right.transposed, dy.dtype)
            dx = start_all_reduce(partial, axis) if gather is None else start_reduce_scatter(partial, gather)
            del left, right, partial
        if gathered is not None:
            dw = products.multiply(by_rows.transposed, gathered().transposed, gradient_dtype(ctx.parameter))
        db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=gradient_dtype(ctx.parameter)) if wants_db else None
        return dx.wait() if dx is not None else None, dw, db, None, None, None, None


class _AddBias(torch.autograd.Function):
    """y + b. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = gradient_dtype(bias)
        return y + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return dy, dy.flatten(0, -2).sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None


class _Lookup(torch.autograd.Function):
    """Rows of a table. Saves their numbers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count, ctx.dtype = table.shape[0], gradient_dtype(table)
        return torch.embedding(table, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (rows,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dy.to(ctx.dtype), rows, ctx.count, -1, False)


def lookup(rows: Tensor, table: Tensor) -> Tensor:
    """Rows of a table by their numbers: [...], [R, D] -> [..., D]."""
    return _Lookup.apply(rows, table)


class _ParallelLinear(nn.Module):
    """A layer whose weight gradient may be put off."""

    products: Products
    weight_gradients: WeightGradients | None = None


def defer_weight_gradients(model: nn.Module, queue: WeightGradients) -> None:
    """Have every linear layer of `model` put its weight gradients into `queue` whenever that defers."""
    for module in model.modules():
        if isinstance(module, _ParallelLinear):
            module.weight_gradients = queue


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose output features are split over the tensor-parallel ranks, possibly several fused into one.

    Args:
        in_features: input size D.
        outputs: output size; or canonical name -> size of several layers fused into one ([q; k; v], [gate; up]).
        axis: the tensor-parallel axis; each output size must be divisible by its size.
        bias: whether there is one, for all outputs.
        sequence_parallel: the input is this rank's [S / T, B, D] and is gathered.
        replicas: canonical name -> ranks that hold the same rows of it (kv heads fewer than ranks).
        init_std: standard deviation of the initial weights.
        products: how it multiplies, forward and backward.

    Forward: [S, B, D] -> [S, B, sum(outputs) / T], this rank's part of each output after one another.

    Example:
        ColumnParallelLinear(16, 32)(torch.randn(4, 1, 16)).shape == (4, 1, 32)
    """

    def __init__(
        self,
        in_features: int,
        outputs: int | Mapping[str, int],
        axis: Axis = ONE_RANK,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        replicas: Mapping[str, int] | None = None,
        init_std: float = 0.02,
        factory: Factory | None = None,
        name: str = "linear",
        products: Products = PLAIN,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel, self.products = axis, sequence_parallel, products
        factory = factory or Factory()
        outputs = {name: outputs} if isinstance(outputs, int) else outputs
        held = {name: (replicas or {}).get(name, 1) for name in outputs}

        def pieces(kind: str, *trailing: int, **facts: float | bool) -> list[Piece]:
            return [
                split(f"{name}.{kind}", (size, *trailing), axis.rank // held[name], axis.size // held[name])
                .with_replicas(axis.rank % held[name], held[name], partial=True)
                .with_facts(**facts)
                for name, size in outputs.items()
            ]

        self.weight = factory.parameter(pieces("weight", in_features, init_std=init_std))
        self.bias = factory.parameter(pieces("bias", decay=False)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        options = self.products, self.axis, self.sequence_parallel, self.weight_gradients
        return _Linear.apply(x, self.weight, self.bias, *options)


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose input features are split over the tensor-parallel ranks; outputs are summed over them.

    Args:
        in_features: whole input size; must be divisible by the axis's size T.
        out_features: output size D.
        axis: the tensor-parallel axis.
        bias: whether there is one; added once, after the sum.
        sequence_parallel: the output is this rank's [S / T, B, D].
        products: how it multiplies, forward and backward.

    Forward: [S, B, in_features / T] -> [S, B, D], or [S / T, B, D] with sequence parallelism.

    Example:
        RowParallelLinear(32, 16)(torch.randn(4, 1, 32)).shape == (4, 1, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis = ONE_RANK,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        init_std: float = 0.02,
        factory: Factory | None = None,
        name: str = "linear",
        products: Products = PLAIN,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel, self.products = axis, sequence_parallel, products
        factory = factory or Factory()
        weight = split(f"{name}.weight", (out_features, in_features), axis.rank, axis.size, dim=1)
        self.weight = factory.parameter([weight.with_facts(init_std=init_std)])
        self.bias = (
            factory.parameter([replicated(f"{name}.bias", (out_features,), axis, partial=sequence_parallel)])
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight, None, self.products, ONE_RANK, False, self.weight_gradients)
        y = scatter_to(y, self.axis) if self.sequence_parallel else reduce_from(y, self.axis)
        return y if self.bias is None else _AddBias.apply(y, self.bias)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows (the vocabulary) are split over the tensor-parallel ranks.

    Args:
        num_embeddings: rows; must be divisible by the axis's size T.
        embedding_dim: D.
        sequence_parallel: the output is this rank's [S / T, B, D].
        copy: which of two copies this is, where first and last pipeline stage are apart and share it; else None.

    Forward: token ids int64 [S, B] -> [S, B, D], or [S / T, B, D] with sequence parallelism.

    Example:
        VocabParallelEmbedding(1024, 16)(torch.randint(1024, (4, 1))).shape == (4, 1, 16)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        axis: Axis = ONE_RANK,
        *,
        sequence_parallel: bool = False,
        init_std: float = 0.02,
        factory: Factory | None = None,
        name: str = "embedding",
        copy: int | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        piece = split(f"{name}.weight", (num_embeddings, embedding_dim), axis.rank, axis.size)
        if copy is not None:
            piece = piece.with_replicas(copy, 2, partial=False)
        self.weight = (factory or Factory()).parameter([piece.with_facts(init_std=init_std)])
        self.first_row = piece.box.start[0]

    def forward(self, tokens: Tensor) -> Tensor:
        if self.axis.size == 1:
            return lookup(tokens, self.weight)
        local = tokens - self.first_row
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x = lookup(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return scatter_to(x, self.axis) if self.sequence_parallel else reduce_from(x, self.axis)


def replicated(name: str, shape: tuple[int, ...], axis: Axis, *, partial: bool, init_mean: float = 0.0) -> Piece:
    """The piece of a vector that every tensor-parallel rank holds whole (norm weights, row-parallel biases).

    Args:
        partial: each rank's gradient is only its own share of the sum.
    """
    return whole(name, shape).with_replicas(axis.rank, axis.size, partial).with_facts(init_mean=init_mean, decay=False)


def sum_footprint(elements: int, item: int, tp: int, sequence_parallel: bool) -> Part:
    """Bytes of the sum over `tp` ranks of a row-parallel layer's `elements` outputs."""
    out = elements * item // (tp if sequence_parallel else 1)
    return Part("residual branch", out, out, elements * item if sequence_parallel else 0, keeps_input=False)


def embedding_footprint(elements: int, weight: int, item: int, gradient: int, tp: int, sequence_parallel: bool) -> Part:
    """Bytes of the embedding of tokens as `elements` elements, from this rank's rows of `weight` elements, whose
    gradient is made in `gradient` bytes each."""
    whole = elements * item
    out = whole // (tp if sequence_parallel else 1)
    forward = whole if tp == 1 else 2 * whole + (out if sequence_parallel else whole)
    # The gradient without the tokens of other ranks, and what it is made of, or made to; a shard's goes when gathered.
    wide = elements * gradient if gradient > item else 0
    masked, gathered = (0, 0) if tp == 1 else (whole, whole if sequence_parallel else 0)
    backward = masked + max(gathered, wide + weight * gradient) - (out if gathered else 0)
    return Part("residual stream", out, forward, backward, keeps_input=False, gradients=weight * gradient)
