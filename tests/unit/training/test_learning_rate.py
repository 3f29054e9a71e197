"""Every schedule equals megatron-core's scheduler, to the last bit, at every step and past the end."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.schema import OptimizerConfig
from megasp.training.learning_rate import learning_rate, learning_rates

scheduler_module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
TRAIN_STEPS = 37
STYLES = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "linear"},
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "inverse-square-root"},
    *(
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 7}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    ),
]
WARMUPS = [
    {},
    {"lr_warmup_iters": 5},
    {"lr_warmup_iters": 5, "lr_warmup_init": 1e-5},
    {"lr_warmup_fraction": 0.2},
    {"lr_warmup_fraction": 0.013},
]


def megatron_rates(config: OptimizerConfig, batches: list[int]) -> list[float]:
    """Before each of these steps, by how much they consume of what the schedule counts."""
    decay_steps = config.lr_decay_iters or config.lr_decay_samples or TRAIN_STEPS
    warmup: float = config.lr_warmup_iters or config.lr_warmup_samples
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * decay_steps
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = scheduler_module.OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=TRAIN_STEPS,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters or config.lr_wsd_decay_samples,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    rates = []
    for batch in batches:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(batch)
    return rates


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style.values())))
@pytest.mark.parametrize("warmup", WARMUPS, ids=lambda warmup: "-".join(warmup) or "no-warmup")
@pytest.mark.parametrize("rest", [{}, {"min_lr": 3e-5, "lr_decay_iters": 23}], ids=["plain", "min-lr"])
def test_equals_megatron(style: dict[str, Any], warmup: dict[str, Any], rest: dict[str, Any]) -> None:
    config = OptimizerConfig(lr=1.1e-3, **style, **warmup, **rest)
    rates = [learning_rate(step, config, TRAIN_STEPS) for step in range(TRAIN_STEPS + 5)]
    assert rates == megatron_rates(config, [1] * (TRAIN_STEPS + 5))


def test_first_steps() -> None:
    config = OptimizerConfig(lr=1e-3, lr_warmup_iters=10)
    assert [learning_rate(step, config, 100) for step in (0, 5, 10)] == [0.0, 5e-4, 1e-3]


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse-square-root", "WSD"])
def test_in_samples_with_a_growing_batch(style: str) -> None:
    """Megatron-LM's rates of the same samples, and not those of so many steps."""
    wsd = {"lr_wsd_decay_samples": 60} if style == "WSD" else {}
    optimizer = {"lr": 1.1e-3, "min_lr": 1e-5, "lr_decay_style": style, "lr_decay_samples": 190, **wsd}
    ramp = {"global_batch_size": 8, "rampup_batch_size": (2, 2, 60), "train_samples": 200, "lr_warmup_samples": 20}
    config = from_values(optimizer | ramp)
    schedule, batches, rates = config.batch_schedule(Layout()), list[int](), list[float]()
    for step in range(config.train_steps(Layout())):
        done = config.training.done(step, sum(batches))
        rates.append(learning_rate(done, config.optimizer, config.training.length))
        batches.append(schedule.at(sum(batches)))
    assert rates == megatron_rates(config.optimizer, batches) and set(batches) == {2, 4, 6, 8}


def test_decoupled() -> None:
    """Embedding and output layer take the same course between rates of their own, as Megatron-LM's group of them."""
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, lr_warmup_iters=3, decoupled_lr=5e-4, lr_decay_style="cosine")
    apart = replace(config, decoupled_min_lr=4e-5)
    for given, low in ((config, 1e-5), (apart, 4e-5)):
        want = megatron_rates(replace(given, lr=5e-4, min_lr=low), [1] * TRAIN_STEPS)
        rates = [learning_rates(step, given, TRAIN_STEPS) for step in range(TRAIN_STEPS)]
        assert [ends for _, ends in rates] == want
        assert [lr for lr, _ in rates] == megatron_rates(config, [1] * TRAIN_STEPS)
    assert learning_rates(9, replace(config, decoupled_lr=None), TRAIN_STEPS)[1] is None
