"""`sequence_parallel`: what is hung around a transformers model so that ranks share its sequences."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from megasp.collectives import start_all_gather
from megasp.config.context_parallel import RING_MODES
from megasp.errors import ConfigError
from megasp.huggingface.attention import NAME, SampleAttention, SplitAttention
from megasp.huggingface.batches import SampleInfo, ShardingCollator
from megasp.huggingface.loaders import share_samples
from megasp.huggingface.loss import ChunkedHead, ShardedLoss
from megasp.huggingface.memory import Offload, tile_mlps
from megasp.huggingface.support import check_model, choose_kernel
from megasp.parallel_state import ParallelState

Model = TypeVar("Model", bound=nn.Module)


def sequence_parallel(
    model: Model,
    state: ParallelState,
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    attention: str | None = None,
    ring_mode: str = "p2p",
    tiled_mlp: bool | int = False,
    chunked_loss: bool = False,
    activation_offload: bool = False,
) -> tuple[Model, ShardingCollator]:
    """Let the ranks of `state.cp` share each sequence of a transformers causal model.

    Nothing of the model is changed but what it calls: attention (transformers' registry), loss function, and where
    asked for MLPs and head. Parameters, their names and saved files stay.

    Args:
        model: a causal model of transformers, or one wrapped by peft; on every rank with the same weights.
        state: the rank grid. Gradients are to be averaged over all its ranks, as DDP, Trainer and `fully_shard` do.
        collate: makes batches of whole samples, as for one process (packing ones, too); without it samples are padded
            at their ends, and their labels are their tokens where they have none.
        attention: the kernel, by transformers' name or ours; the best that the machine has without it.
        ring_mode: how ring ranks exchange: p2p, all_gather or lightseq.
        tiled_mlp: let MLPs work on some tokens at a time: on so many, or with True on as many as the model is wide.
        chunked_loss: compute head and loss together, so that logits never exist.
        activation_offload: keep what gradient checkpointing saves in the host's memory.
    Returns:
        The same model, and the collator whose batches it takes.
    Raises:
        ConfigError: the model, or one of the options for it, cannot be served.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    check_model(base, state)
    if base.config._attn_implementation == NAME:
        raise ConfigError("sequence_parallel called twice", "a model is of one rank grid", "load it again")
    if ring_mode not in RING_MODES:
        raise ConfigError(f"ring_mode {ring_mode!r}", f"it is one of {', '.join(RING_MODES)}", "use 'p2p'")
    if activation_offload and state.device.type == "cpu":
        raise ConfigError("activation_offload on a CPU", "it is from a device to the host's memory", "leave it out")
    split = SplitAttention(state, choose_kernel(attention, base, state), ring_mode)
    loss = ShardedLoss(state)
    if tiled_mlp:
        tile_mlps(base, base.config.get_text_config().hidden_size if tiled_mlp is True else tiled_mlp)
    if chunked_loss:
        loss.head = ChunkedHead(base.get_output_embeddings())
    if activation_offload:
        Offload(base)
    base.set_attn_implementation(NAME)
    base.loss_function = loss
    calls = _Calls(state, split, loss)
    base.register_forward_pre_hook(calls.begin, with_kwargs=True)
    base.register_forward_hook(calls.end, with_kwargs=True, always_call=True)
    share_samples()
    padding = getattr(base.config.get_text_config(), "pad_token_id", None)
    return model, ShardingCollator.of(state, ring_mode, padding if isinstance(padding, int) else 0, collate)


class _Calls:
    """What happens before and after each call of the model."""

    def __init__(self, state: ParallelState, split: SplitAttention, loss: ShardedLoss) -> None:
        self.state, self.split, self.loss = state, split, loss
        self.attention: SampleAttention | None = None

    def begin(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give attention what it must know of the batch; refuse a call that shards cannot serve."""
        samples = kwargs.pop("sample_info", None)
        if samples is None or kwargs.get("position_ids") is None:
            raise ConfigError(
                "a batch without positions",
                "each rank must know which tokens of the whole samples it holds",
                "pass it through the collator that sequence_parallel returned (collate.shard for a batch)",
            )
        if kwargs.get("attention_mask") is not None:
            raise ConfigError(
                "an attention_mask beside a shard",
                "padding and documents of the whole samples are in what the collator gives attention",
                "give the mask to the collator (collate.shard for a batch), which leaves it out here",
            )
        if kwargs.get("past_key_values") is not None:
            raise ConfigError("past_key_values", "ranks hold shards, which no cache continues", "generate without it")
        if (kwargs.get("labels") is None) != (kwargs.get("shift_labels") is None):
            raise ConfigError(
                "a batch with only one of labels and shift_labels",
                "a loss that is not the model's own (label smoothing, compute_loss_func) cannot shift over shards",
                "leave the loss to the model; for logits alone drop both",
            )
        self._check_group(samples, kwargs)
        kwargs.setdefault("use_cache", False)
        self.attention = kwargs["sample_attention"] = SampleAttention(self.split, samples)
        self.loss.called = False
        head = self.loss.head
        if head is not None and kwargs.get("labels") is not None:
            if model.get_output_embeddings() is not head.head:
                raise ConfigError(
                    "chunked_loss with an adapter around the output head",
                    "it computes the head that it was given",
                    "leave the adapter or chunked_loss out",
                )
            head.targets = kwargs["shift_labels"]
        return args, kwargs

    def _check_group(self, samples: SampleInfo, kwargs: Mapping[str, Any]) -> None:
        """Ranks that share a sequence hold parts of the same samples, and count their targets together."""
        count = kwargs.get("num_items_in_batch")
        mine = torch.tensor([[samples.fingerprint, -1 if count is None else int(count)]], device=self.state.device)
        every = start_all_gather(mine, self.state.cp).wait()
        same_samples, same_count = (every == every[0]).all(0).tolist()
        if not same_samples:
            raise ConfigError(
                "ranks of one sequence with different samples",
                "each must be given all of the same samples, of which it keeps its shard",
                f"let the loader read for {self.state.dp.size} data ranks (state.dp), not for every rank",
            )
        if not same_count:
            raise ConfigError(
                "num_items_in_batch that differs between ranks of one sequence",
                "it is the targets of the global batch",
                "set average_tokens_across_devices=True, or sum the counts of all ranks",
            )

    def end(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """See that attention and loss were ours, and take out what stood in the logits' place."""
        attention, self.attention = self.attention, None
        stand_in = self.loss.head.finish() if self.loss.head is not None else None
        if output is None or attention is None:
            return None  # the forward raised
        if not attention.called or (kwargs.get("labels") is not None and not self.loss.called):
            raise ConfigError(
                f"{type(model).__name__} whose {'loss' if attention.called else 'attention'} is its own",
                "it must be the one that transformers lets others set",
                "train another model, or this one without sequence parallelism",
            )
        if stand_in is None:
            return output
        if isinstance(output, tuple):
            return tuple(x for x in output if x is not stand_in)
        return type(output)(**{name: x for name, x in output.items() if x is not stand_in})
