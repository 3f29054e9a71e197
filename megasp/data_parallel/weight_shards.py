"""Sharded weights: ZeRO-1, -2 and -3 (arXiv 1910.02054), alone or replicated (hybrid sharding).

Each rank of `dp_cp` owns some rows of every parameter, their gradients and their optimizer states. PyTorch's
`fully_shard` gathers weights before a block runs, and scatters the sums of gradients behind it:

    stage   weights of a step   gradients between microbatches   all-gathers and reduce-scatters of M microbatches
    1       gathered once       whole, on every rank             1 and 1
    2       gathered once       shards                           1 and M
    3       gathered by block   shards                           2 M and M

With deferred weight gradients they are whole until the last one is there, and the step has one reduction.

No rank ever holds the whole model: modules come without values, and each rank makes those of its own rows. With ZeRO-3
the shards may be in the host's memory. A block's are then copied to the device before they are gathered, one block
ahead, and the sums of its gradients go to the host behind its backward.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megasp.collectives import start_all_gather, start_reduce_scatter
from megasp.data_parallel.replicas import master_dtype
from megasp.model import Factory, GPTModel
from megasp.parallel_state import Axis, ParallelState
from megasp.parameters import Piece, rows_of


class WeightShards:
    """The training state of a model whose weights the ranks of `dp_cp` share out. Used as `Replicas` is.

    `masters` are plain tensors that share memory with this rank's shards, each with its `pieces`: optimizer, norm and
    checkpoints see no DTensor. A parameter of which this rank has no row has no master here.

    Args:
        stages: models on the device "meta", in their compute dtype; they are wrapped in place, and their weights become
            fp32 shards with initial values.
        factory: of the compute dtype and the seed.
        state: `dp_cp` shards, `dp_outer` replicates.
        zero_stage: 1, 2 or 3.
        gradient_dtype: of accumulation and reduction; fp32 or wider without it.
        deferred: weight gradients come apart from the backward.
        widen: gradients of a microbatch are made in the gradient dtype, and not in the compute dtype.
        on_host: with ZeRO-3: shards of weights and gradients, and so `masters`, are in the host's memory.
    """

    def __init__(
        self,
        stages: Sequence[GPTModel],
        factory: Factory,
        state: ParallelState,
        zero_stage: int,
        gradient_dtype: torch.dtype | None = None,
        deferred: bool = False,
        widen: bool = False,
        on_host: bool = False,
    ) -> None:
        self.zero_stage, self.deferred, self.widen = zero_stage, deferred, widen
        self._offload = CPUOffloadPolicy(pin_memory=state.device.type == "cuda") if on_host else OffloadPolicy()
        self.shard_axis, self.outer = state.axes["dp_cp"], state.axes["dp_outer"]
        self.owner = self.outer.rank == 0
        pieces = [p.pieces for stage in stages for p in stage.parameters()]  # type: ignore[attr-defined]
        mesh = _mesh(state)
        for stage in stages:
            self._wrap(stage, mesh, gradient_dtype)
            stage.to_empty(device="cpu" if on_host else state.device)
        self._roots: list[FSDPModule] = list(stages)  # type: ignore[arg-type]
        self._sharded = [p for stage in stages for p in stage.parameters()]
        held = (
            (_master(p, all_pieces, self.shard_axis), p) for p, all_pieces in zip(self._sharded, pieces, strict=True)
        )
        self._pairs = [(master, p) for master, p in held if master.numel()]
        self.masters = [master for master, _ in self._pairs]
        for master in self.masters:
            factory.fill_(master.data, master.pieces)  # type: ignore[attr-defined]

    def _wrap(self, model: GPTModel, mesh: DeviceMesh, gradient_dtype: torch.dtype | None) -> None:
        """Shard the embedding (if nothing else uses it), every block, the final norm, and what is left, each as one
        group. Of embeddings and head the backward needs no weight: the head's gradients come from its forward."""
        compute = next(model.parameters()).dtype
        wide = master_dtype(compute)
        policy = MixedPrecisionPolicy(compute, gradient_dtype or wide, cast_forward_inputs=False)
        alone = [model.embedding] if model.embedding is not None and model.head is not model.embedding else []
        norm = [model.final_norm] if model.final_norm is not None else []
        for unit in (*alone, *model.layers, *norm, model):
            for p in unit.parameters():
                if not isinstance(p, DTensor):
                    p.data = p.data.to(wide)
            reshard = self.zero_stage == 3
            wrapped = fully_shard(
                unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=self._offload
            )
            # Sums, not means: the loss is divided by the global number of tokens. Neither call recurses.
            if self.shard_axis.size * self.outer.size > 1:  # alone, it would be a copy
                wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)
            wrapped.set_custom_all_gather(AllGather(self.shard_axis))
            wrapped.set_custom_reduce_scatter(ReduceScatter(self.shard_axis))
            if self.widen:
                wrapped.register_forward_pre_hook(_takes_gradients_in(policy.reduce_dtype))
            if self.outer.size > 1:
                wrapped.set_all_reduce_hook(self._count_all_reduce)
        for unit in (*alone, model):
            unit.set_unshard_in_backward(False)  # type: ignore[operator]
        # Nothing is gathered ahead of what follows the first layer's backward: it would be the last unit, for another
        # microbatch, though a pipeline may have none, or none next.
        first = model.layers[0]
        first.set_modules_to_backward_prefetch([first])  # type: ignore[operator]

    def _count_all_reduce(self, x: Tensor) -> None:
        """fully_shard sums shards over replicas by itself."""
        self.outer.traffic.add("all_reduce", 2 * x.nbytes * (self.outer.size - 1) // self.outer.size)

    def begin_microbatch(self, last: bool) -> None:
        """Before each backward: whether it is the last one of its pipeline stage in this step."""
        for root in self._roots:
            _let_go_of_sent(root)
            root.set_requires_gradient_sync(not self.deferred and (last or self.zero_stage > 1))
            root.set_requires_all_reduce(last)
            root.set_reshard_after_backward(self.zero_stage == 3 or (last and not self.deferred))
            root.set_is_last_backward(last and not self.deferred)
            if self.deferred:
                _take_gradients(root)  # what was deferred, before more is added to it in low precision

    def finish(self) -> None:
        """After the last backward: leave on every master the sum of its gradient over all ranks that hold it."""
        for root in self._roots if self.deferred else ():
            _take_gradients(root)
            root.set_requires_gradient_sync(True)
            root.set_requires_all_reduce(True)
            root.set_reshard_after_backward(True)
            root.set_is_last_backward(True)
            _take_gradients(root)
        for master, sharded in self._pairs:
            assert isinstance(sharded.grad, DTensor), "a parameter got no gradient"
            with torch.no_grad():
                master.grad = sharded.grad.to_local()

    def gradients(self) -> Iterator[Tensor]:
        """All that is there of gradients now, whole and in shards."""
        for module in (module for root in self._roots for module in root.modules()):  # type: ignore[attr-defined]
            if isinstance(module, FSDPModule):
                yield from _gradients(module)

    def whole_for_a_step(self) -> Iterator[Tensor]:
        """With ZeRO-1 and -2, the weights that are gathered now."""
        parameters = (p for root in self._roots for p in root.parameters())  # type: ignore[attr-defined]
        yield from (p for p in parameters if self.zero_stage < 3 and not isinstance(p, DTensor))

    def publish(self) -> None:
        """After the optimizer's step: drop gradients, and weights that were gathered before it."""
        for master in self.masters:
            master.grad = None
        for sharded in self._sharded:
            sharded.grad = None
        for root in self._roots:
            for module in root.modules():  # type: ignore[attr-defined]
                if isinstance(module, FSDPModule):
                    module.reshard()


def _mesh(state: ParallelState) -> DeviceMesh:
    """The ranks that hold the same weights: dp_outer x dp_cp, or dp_cp alone."""
    outer, inner = state.axes["dp_outer"], state.axes["dp_cp"]
    device = state.device.type
    group = inner.group or dist.new_group([state.rank], use_local_synchronization=True)
    if outer.group is None:
        return DeviceMesh.from_group(group, device, mesh_dim_names=("dp_cp",))
    ranks = state.layout.group(("dp_outer", "dp_inner", "ring", "ulysses"), state.rank)
    table = [ranks[start : start + inner.size] for start in range(0, len(ranks), inner.size)]
    return DeviceMesh.from_group([outer.group, group], device, mesh=table, mesh_dim_names=("dp_outer", "dp_cp"))


def _master(parameter: nn.Parameter, pieces: tuple[Piece, ...], axis: Axis) -> nn.Parameter:
    """This rank's rows of a sharded parameter: rows in equal parts but for the last ones, as `torch.chunk` cuts."""
    assert isinstance(parameter, DTensor)
    with torch.no_grad():
        master = nn.Parameter(parameter.to_local())
    each = -(-parameter.shape[0] // axis.size)
    start, stop = (min(n * each, parameter.shape[0]) for n in (axis.rank, axis.rank + 1))
    assert master.shape[0] == stop - start, (parameter.shape, axis)
    master.pieces = rows_of(pieces, start, stop)  # type: ignore[attr-defined]
    return master


def _takes_gradients_in(dtype: torch.dtype | None) -> Callable[[nn.Module, object], None]:
    """A hook that has the weights of a group, which are there whole from its first forward on, take gradients so."""

    def hook(unit: nn.Module, inputs: object) -> None:
        for p in unit.parameters():
            if not isinstance(p, DTensor) and p.grad_dtype != dtype:
                p.grad_dtype = dtype

    return hook


def _take_gradients(root: FSDPModule) -> None:
    """Do with the gradients that are there what a backward's end does: keep them in the gradient dtype, or reduce them.

    A private name of `fully_shard`, the one that PyTorch's own pipeline stages use for the same purpose.
    """
    fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def _gradients(module: FSDPModule) -> Iterator[Tensor]:
    """Those of a module's own group; private names."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for each in (each for group in groups if group is not None for each in group.fsdp_params):
        whole = getattr(each, "_unsharded_param", None)
        for x in (each.sharded_param.grad, None if whole is None else whole.grad, each.unsharded_accumulated_grad):
            if x is not None:
                yield x._local_tensor if isinstance(x, DTensor) else x


def _let_go_of_sent(root: FSDPModule) -> None:
    """Let go of the last gradients that a backward sent, which `fully_shard` holds until the next one of the same stage
    is under way: private names, of torch 2.13 and of those before.
    """
    sent = fully_shard.state(root)._comm_ctx  # type: ignore[attr-defined]
    if hasattr(sent, "reduce_scatter_states"):
        held, sent.reduce_scatter_states = sent.reduce_scatter_states, []
    else:
        held, sent.reduce_scatter_state = [sent.reduce_scatter_state], None
    for each in held:
        if each is not None and each.event is not None:
            torch.cuda.current_stream().wait_event(each.event)


class Transport:
    """How fully_shard allocates and moves its buffers: by our collectives, where bytes are counted."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(Transport):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        start_all_gather(input_tensor, self.axis, output_tensor).wait()


class ReduceScatter(Transport):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        start_reduce_scatter(input_tensor, self.axis, output_tensor).wait()
