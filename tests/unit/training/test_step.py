"""One step: the loss is a mean over the tokens of the global batch, whatever its cut; gradients that are not finite
change nothing; the optimizer's groups and counter; resuming after a skipped step."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasp.config.load import from_values
from megasp.data import Batch
from megasp.parallel_state import ParallelState
from megasp.training import resume
from megasp.training.build import Training, build
from megasp.training.datasets import phase_of
from megasp.training.optimizer import build_optimizer, set_learning_rate, set_step
from megasp.training.resume import Progress
from megasp.training.step import accumulate_gradients, apply_gradients, evaluate, train_step

VALUES: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "vocab_size": 16,
    "make_vocab_size_divisible_by": 16, "max_position_embeddings": 6, "seq_length": 6, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "lr": 0.01, "train_iters": 10, "mock_data": True,
}  # fmt: skip


def training(dtype: torch.dtype = torch.float64, **values: Any) -> Training:
    return build(from_values(VALUES | values), ParallelState.single(), dtype)


def batches(masks: list[float], rows: int = 2) -> list[Batch]:
    """Microbatches of random tokens; a number is the share of tokens that count."""
    random = np.random.default_rng(0)
    made = []
    for index, share in enumerate(masks):
        tokens = random.integers(0, 16, (2, rows, 6))
        mask = random.permutation(np.arange(rows * 6) < share * rows * 6).reshape(rows, 6).astype(np.float32)
        samples = np.arange(index * rows, (index + 1) * rows)
        made.append(Batch(tokens[0], tokens[1], mask, np.arange(6), samples))
    return made


def joined(parts: list[Batch]) -> Batch:
    fields = ("tokens", "labels", "loss_mask", "samples")
    return Batch(*(np.concatenate([getattr(b, f) for b in parts]) for f in fields[:3]), parts[0].positions,
                 np.concatenate([b.samples for b in parts]))  # fmt: skip


def grads(held: Training) -> list[torch.Tensor]:
    return [master.grad.clone() for master in held.replicas.masters]  # type: ignore[union-attr]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_does_not_depend_on_the_cut(dropout: float) -> None:
    """Three microbatches with unequal counts, one with none, against one of all: a mean of means would differ."""
    parts = batches([1.0, 0.2, 0.0, 0.6])
    counts = [b.loss_mask.sum() for b in parts]
    assert len(set(counts)) == 4 and counts[2] == 0
    cut, whole = training(hidden_dropout=dropout), training(hidden_dropout=dropout)
    loss, tokens = accumulate_gradients(cut, parts)
    expected, expected_tokens = accumulate_gradients(whole, [joined(parts)])
    assert tokens == expected_tokens == sum(counts) and loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grads(cut), grads(whole))
    logits_loss = whole.model[0].eval()(
        *(torch.as_tensor(getattr(joined(parts), f)) for f in ("tokens", "labels", "loss_mask"))
    )
    if not dropout:
        assert loss == pytest.approx(logits_loss.item() / tokens, rel=1e-12)


def test_all_masked_is_finite() -> None:
    held = training()
    before = [master.detach().clone() for master in held.replicas.masters]
    result = train_step(held, batches([0.0, 0.0]), lr=0.01)
    assert (result.loss, result.grad_norm, result.tokens) == (0.0, 0.0, 0)
    for master, old in zip(held.replicas.masters, before, strict=True):
        torch.testing.assert_close(master.detach(), old, rtol=1e-3, atol=0)  # weight decay alone


def test_step_is_adamw_on_the_clipped_gradient() -> None:
    """Against torch.optim.AdamW by hand, two steps, and the norm reported is that before clipping."""
    held, mirror = training(clip_grad=0.1, weight_decay=0.1), training(clip_grad=0.0)
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in mirror.replicas.masters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in mirror.replicas.masters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for step, lr in enumerate((0.01, 0.002)):
        parts = batches([0.5, 1.0])
        result = train_step(held, parts, lr)
        accumulate_gradients(mirror, parts)
        norm = torch.nn.utils.clip_grad_norm_(mirror.replicas.masters, 0.1).item()
        assert result.grad_norm == pytest.approx(norm, rel=1e-9) and norm > 0.1, step
        set_learning_rate(plain, lr)
        plain.step()
        plain.zero_grad()
    for a, b in zip(held.replicas.masters, mirror.replicas.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    held = training(dtype)
    train_step(held, batches([1.0]), 0.01)
    state = [tensor for s in held.optimizer.state.values() for tensor in s.values()]
    everything = [*held.model.parameters(), *held.replicas.masters, *state]
    before = [x.detach().clone() for x in everything]
    accumulate_gradients(held, batches([1.0]))
    held.replicas.masters[0].grad[0, 0] = value  # type: ignore[index]
    assert not math.isfinite(apply_gradients(held, 0.01))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True)), "weights or moments moved"
    assert all(master.grad is None for master in held.replicas.masters), "the bad gradient is dropped"
    assert math.isfinite(train_step(held, batches([1.0]), 0.01).grad_norm), "the next step is sound"


def test_losses_fall() -> None:
    held = training(torch.float32)
    losses = [train_step(held, batches([1.0, 1.0]), 0.01).loss for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(16), abs=0.1) and losses[-1] < 0.6 * losses[0]


def test_evaluation() -> None:
    """Per token over all its batches, without dropout, and nothing learned."""
    held = training(hidden_dropout=0.5)
    steps = [batches([1.0, 0.1]), batches([0.0, 0.4])]
    before = [p.detach().clone() for p in held.model.parameters()]
    found = evaluate(held, steps)
    plain = training()
    whole = joined([b for step in steps for b in step])
    assert found == pytest.approx(accumulate_gradients(plain, [whole])[0], rel=1e-12)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, held.model.parameters(), strict=True))
    assert evaluate(held, [batches([0.0])]) == 0.0 and evaluate(held, []) == 0.0


# The optimizer


def test_groups() -> None:
    """Matrices and learned positions decay; biases and norms do not. Nothing is left out or twice."""
    held = training(weight_decay=0.25, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-5)
    decaying, others = held.optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    names = [{p.pieces[0].name for p in group["params"]} for group in held.optimizer.param_groups]
    assert {"embedding.weight", "position_embedding.weight", "layers.0.attention.o.weight"} <= names[0]
    assert {"final_norm.weight", "final_norm.bias", "layers.0.mlp.up.bias", "layers.0.attention.q.bias"} <= names[1]
    assert not any("norm" in n or n.endswith("bias") for n in names[0])
    assert all("norm" in n or n.endswith("bias") for n in names[1])
    assert len(decaying["params"]) + len(others["params"]) == len(held.replicas.masters)
    assert (decaying["betas"], decaying["eps"], decaying["lr"]) == ((0.8, 0.95), 1e-5, 0.01)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rate_of_the_ends(untie: bool, share: float) -> None:
    """With a rate of their own embedding and output layer move as in a run at that rate, the rest as at its own."""
    values = {"untie_embeddings_and_output_weights": untie, "optimizer_cpu_offload": share > 0, "weight_decay": 0.1}
    own, slow, fast = training(**values, decoupled_lr=0.1), training(**values), training(**values)
    for held, rates in ((own, (0.01, 0.1)), (slow, (0.01,)), (fast, (0.1,))):
        train_step(held, batches([1.0]), *rates)
    ends = {"embedding.weight", "head.weight"} if untie else {"embedding.weight"}
    names = [p.pieces[0].name for p in own.optimizer.masters]  # type: ignore[attr-defined]
    assert ends <= set(names) and set(names) & {"embedding.weight", "head.weight"} == ends
    for name, *found in zip(names, *(h.optimizer.masters for h in (own, slow, fast)), strict=True):
        torch.testing.assert_close(found[0], found[2 if name in ends else 1], rtol=0, atol=0)
        assert not torch.equal(found[1], found[2])


def test_state_and_step_counter() -> None:
    """State exists from the start, so that a checkpoint can fill it; its counter is what bias correction reads."""
    held = training()
    assert all(set(held.optimizer.state[m]) == {"step", "exp_avg", "exp_avg_sq"} for m in held.replicas.masters)
    set_step(held.optimizer, 41)
    train_step(held, batches([1.0]), 0.01)
    assert {s["step"].item() for s in held.optimizer.state.values()} == {42.0}
    set_learning_rate(held.optimizer, 0.5)
    assert [group["lr"] for group in held.optimizer.param_groups] == [0.5, 0.5]
    config = dataclasses.replace(held.config.optimizer, lr=None)
    assert build_optimizer(held.replicas.masters, config).param_groups[0]["lr"] == 0.0


def counters(held: Training) -> set[float]:
    return {state["step"].item() for state in held.optimizer.state.values()}


def test_resume_after_a_skipped_step(tmp_path: Path) -> None:
    """The optimizer has taken fewer steps than the run has; a resumed run must go on from the same count."""
    held = training(save=str(tmp_path))
    phases = [phase_of(held.config, held.state.layout)]
    train_step(held, batches([1.0]), 0.01)
    accumulate_gradients(held, batches([1.0]))
    held.replicas.masters[0].grad[0, 0] = math.nan  # type: ignore[index]
    apply_gradients(held, 0.01)
    assert counters(held) == {1.0}
    resume.save(held, Progress(step=2, samples=4, tokens=24), phases)
    again = training(load=str(tmp_path))
    assert resume.resume(again, resume.find(again.config, again.state)).step == 2
    assert counters(again) == {1.0}, "bias correction would differ from the unbroken run's"
    for run in (held, again):
        train_step(run, batches([1.0]), 0.01)
    assert all(torch.equal(a, b) for a, b in zip(held.replicas.masters, again.replicas.masters, strict=True))


def test_resume_after_a_fresh_optimizer(tmp_path: Path) -> None:
    """A run resumed with --no-load-optim counts from 0; what it saves resumes from its own count."""
    held = training(save=str(tmp_path / "a"))
    phases = [phase_of(held.config, held.state.layout)]
    train_step(held, batches([1.0]), 0.01)
    resume.save(held, Progress(step=100, samples=200, tokens=1200), phases)
    fresh = training(load=str(tmp_path / "a"), save=str(tmp_path / "b"), no_load_optim=True)
    assert resume.resume(fresh, resume.find(fresh.config, fresh.state)).step == 100 and counters(fresh) == {0.0}
    train_step(fresh, batches([1.0]), 0.01)
    resume.save(fresh, Progress(step=101, samples=202, tokens=1212), phases)
    again = training(load=str(tmp_path / "b"))
    assert resume.resume(again, resume.find(again.config, again.state)).step == 101
    assert counters(again) == {1.0}
