"""Training of transformers models over split sequences: Trainer, fully_shard, and what the ranks notice together."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.errors import ConfigError
from tests.parity.test_huggingface import TOLERANCE, VOCAB, error, model_of, whole_batch
from tests.ranks import run_ranks


def samples() -> list[dict[str, Tensor]]:
    """Twelve of different lengths; of the second the last third alone is counted."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1, VOCAB, (9 + 5 * (i % 4),), generator=generator) for i in range(12)]
    labels = [x.clone() for x in tokens]
    labels[1][: 2 * len(labels[1]) // 3] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def padded(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole samples, padded at their ends."""
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([x["input_ids"] for x in features], batch_first=True)
    labels = pad([x["labels"] for x in features], batch_first=True, padding_value=-100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": (tokens != 0).long()}


def trained(layout: str, folder: Path, lora: bool, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of one epoch of Trainer: three steps of two microbatches of two samples."""
    from megasp.huggingface import sequence_parallel

    model, collate = model_of("Llama"), padded
    if lora:
        import peft

        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]  # Accelerate asks for a host name without it
    dp = 1
    if layout:
        state = parallel_state.build(Layout.parse(layout), torch.device("cpu"))
        model, collate = sequence_parallel(model, state, **options)
        dp = state.dp.size
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2 // dp,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=bool(layout),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = transformers.Trainer(
        model, args, train_dataset=samples(), eval_dataset=samples()[:4], data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    return losses, {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Samples without an index; their first tokens are 10, 11, ..."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": torch.full((8,), 10 + number)} for number in range(4))


def streamed(layout: str) -> list[int]:
    """The samples that this rank reads of a stream."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from megasp.huggingface.batches import ShardingCollator
    from megasp.huggingface.loaders import share_samples

    share_samples()
    state = parallel_state.build(Layout.parse(layout), torch.device("cpu"))
    collate = ShardingCollator.of(state, "p2p", 0, None)
    loader = DataLoader(Stream(), batch_size=1, collate_fn=collate)
    with pytest.raises(ConfigError, match="dispatch_batches"):
        Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True)).prepare(loader)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    return [int(batch["input_ids"][0, 0]) for batch in accelerator.prepare(loader)]


def trainings(layout: str, folder: Path) -> tuple[list[tuple[list[float], dict[str, Tensor]]], list[int]]:
    """Of all weights with what saves memory, and of adapters; and what is read of a stream."""
    savers = {"chunked_loss": True, "tiled_mlp": 4} if layout else {}
    both = [trained(layout, folder, lora=False, **savers), trained(layout, folder, lora=True)]
    return both, streamed(layout) if layout else []


def test_trainer(tmp_path: Path) -> None:
    """Three steps with accumulation, and an evaluation, end where the unsharded Trainer ends."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    ((references, _),) = run_ranks(trainings, 1, "", tmp_path)
    for rank, (results, read) in enumerate(run_ranks(trainings, 4, "u2-dp2", tmp_path)):
        assert read == ([10, 12] if rank < 2 else [11, 13])
        for (losses, mine), (want, weights) in zip(results, references, strict=True):
            assert len(losses) == 4
            assert losses == pytest.approx(want, rel=1e-4)
            for name, weight in weights.items():
                assert error(mine[name], weight) < 1e-4, name


def sharded_gradients() -> float:
    """Largest error of gradients under `fully_shard` over all ranks, with everything that saves memory."""
    from megasp.huggingface import sequence_parallel

    whole = whole_batch("packed", 1)
    reference = model_of("Llama")
    count = (whole["labels"][:, 1:] != -100).sum()
    reference(**whole, num_items_in_batch=count, use_cache=False).loss.backward()
    state = parallel_state.build(Layout(ulysses=2), torch.device("cpu"))
    model, collate = sequence_parallel(model_of("Llama"), state, chunked_loss=True, tiled_mlp=4)
    model.gradient_checkpointing_enable()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**collate.shard(whole)).loss.backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(error(mine.grad.full_tensor(), theirs.grad) for mine, theirs in pairs)


def autocast_losses() -> tuple[float, float]:
    """The loss in bf16 of ranks together, and of one process."""
    from megasp.huggingface import sequence_parallel

    whole = whole_batch("packed", 1)
    state = parallel_state.build(Layout(ring=2), torch.device("cpu"))
    model, collate = sequence_parallel(model_of("Qwen3"), state, chunked_loss=True, tiled_mlp=4)
    with torch.autocast("cpu", torch.bfloat16):
        want = model_of("Qwen3")(**whole, use_cache=False).loss
        got = model(**collate.shard(whole)).loss
    got.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    loss = got.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size(), want.item()


def noticed() -> list[str]:
    """What two ranks of a sequence say when they are given different samples, or count by themselves."""
    from megasp.huggingface import sequence_parallel

    state = parallel_state.build(Layout(ring=2), torch.device("cpu"))
    model, collate = sequence_parallel(model_of("Llama"), state)
    whole = whole_batch("packed", 1)
    other = whole | {"input_ids": whole["input_ids"] + state.rank}
    said = []
    for batch, count in ((other, None), (whole, 5 + state.rank)):
        with pytest.raises(ConfigError) as refusal:
            model(**collate.shard(batch), num_items_in_batch=count)
        said.append(str(refusal.value))
    return said


def two_ranks() -> tuple[float, tuple[float, float], list[str]]:
    return sharded_gradients(), autocast_losses(), noticed()


def test_fully_shard_autocast_and_what_ranks_notice() -> None:
    for worst, (loss, want), said in run_ranks(two_ranks, 2):
        assert worst < TOLERANCE
        assert loss == pytest.approx(want, rel=1e-2)
        assert "ranks of one sequence with different samples" in said[0]
        assert "average_tokens_across_devices" in said[1]
