"""The time of what is on the host."""

import dataclasses

import pytest

from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.presets import PRESETS
from megasp.config.validate import validate
from megasp.planner import hardware
from megasp.planner.job import Job
from megasp.planner.rates import Rates
from megasp.planner.step_time import step_time

H100 = hardware.load("h100-80")


def test_step_and_fetches() -> None:
    """The step is bound by the memory that a node's GPUs share; shards of weights are copied thrice a microbatch."""
    zero3 = {"data_parallel_sharding_strategy": "optim_grads_params", "global_batch_size": 64, "bf16": True}
    config = from_values(PRESETS["llama3-8b"] | zero3 | {"mock_data": True, "train_iters": 1, "lr": 1e-4})
    job, rates = Job.of(config, validate(config, 8, "cuda")), Rates(H100)
    plain, away = step_time(job, rates), step_time(dataclasses.replace(job, offload_optimizer=1.0), rates)
    half = step_time(dataclasses.replace(job, offload_optimizer=0.5), rates)
    assert away.parts["optimizer"] == pytest.approx(40 * 8.03e9 / 400e9, rel=0.02)
    assert plain.parts["optimizer"] < half.parts["optimizer"] < away.parts["optimizer"]
    there = dataclasses.replace(job, offload_optimizer=1.0, offload_weights=True)
    assert step_time(there, rates).parts["zero"] > away.parts["zero"]
    alone = dataclasses.replace(there, layout=Layout(zero=3))
    copies = 3 * 4 * job.layer_parameters / H100.host_rate * 32 * job.microbatches
    assert step_time(alone, rates).parts["zero"] == pytest.approx(copies, rel=1e-6), "nothing is fetched ahead"
