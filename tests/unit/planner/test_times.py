"""The time model: operations against measured tables, closed forms against the simulator, parts against the whole."""

import dataclasses

import pytest

from megasp.config.load import from_values
from megasp.config.presets import PRESETS
from megasp.config.validate import validate
from megasp.planner.hardware import load
from megasp.planner.job import Job
from megasp.planner.layer_time import layer_parts
from megasp.planner.rates import Coefficients, Group, Rates
from megasp.planner.step_time import Microbatch, message_seconds, quick_seconds, step_time

IDEAL = Coefficients(matmul=1.0, attention=1.0, memory=1.0, network=1.0)
H100, A100 = Rates(load("h100-80"), IDEAL), Rates(load("a100-80"), IDEAL)


def job(gpus: int = 64, **values: object) -> Job:
    base = PRESETS["llama3-70b"] | {"bf16": True, "mock_data": True, "train_iters": 1, "lr": 1e-4, "eval_iters": 0}
    config = from_values(base | {"global_batch_size": 128} | values)
    return Job.of(config, validate(config, gpus, "cuda"))


@pytest.mark.parametrize(
    ("n", "measured"), [(2048, 222), (4096, 228), (8192, 254), (16384, 257)]
)  # A100, cuBLASLt, TFLOP/s
def test_matmul_by_size(n: int, measured: float) -> None:
    assert 2 * n**3 / A100.matmul(n, n, n) / 1e12 == pytest.approx(measured, rel=0.2)


def test_a_thin_product_is_bound_by_memory() -> None:
    seconds = H100.matmul(1, 8192, 8192)
    assert seconds == pytest.approx(2 * 8192 * 8192 / load("h100-80").memory_rate, rel=0.01)


def test_all_reduce_inside_and_between_nodes() -> None:
    size = 1.073e9
    inside = H100.collective(Group(8, 1), size, "reduce")
    assert 2 * size * 7 / 8 / inside / 1e9 == pytest.approx(466, rel=0.01)
    across = H100.collective(Group(16, 1), size, "reduce")
    assert across > inside
    one_port = H100.collective(Group(16, 8), size, "reduce")  # a rank of each node: one port, and eight such groups
    assert 2 * size * 15 / 16 / one_port / 1e9 == pytest.approx(50, rel=0.05)


def test_parts_sum_to_the_step() -> None:
    time = step_time(job(tensor_model_parallel_size=4, pipeline_model_parallel_size=4, sequence_parallel=True), H100)
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert all(seconds >= -1e-9 for seconds in time.parts.values())
    assert time.tokens_per_second_per_gpu == pytest.approx(128 * 8192 / time.seconds / 64)


def test_closed_forms_agree_with_the_simulator() -> None:
    for schedule, extra in (
        ("1f1b", {}),
        ("zb-h1", {}),
        ("interleaved", {"num_virtual_stages_per_pipeline_rank": 5}),
        ("zbv", {}),
    ):
        this = job(
            tensor_model_parallel_size=4, pipeline_model_parallel_size=4, sequence_parallel=True,
            pipeline_schedule=schedule, **extra,
        )  # fmt: skip
        assert quick_seconds(this, H100, Microbatch.of(this, H100)) == pytest.approx(
            step_time(this, H100).seconds, rel=0.04
        ), schedule


def test_many_microbatches_are_continued_exactly() -> None:
    this = job(tensor_model_parallel_size=8, pipeline_model_parallel_size=8, sequence_parallel=True)
    few, many = (
        step_time(dataclasses.replace(this, microbatches=number), H100).parts["pipeline"] for number in (40, 400)
    )
    assert many == pytest.approx(few, rel=0.02)  # the bubble does not depend on their number


def test_recompute_costs_what_it_repeats() -> None:
    plain, full = job(), job(recompute_granularity="full")
    parts = layer_parts(plain, H100)["F"], layer_parts(full, H100)["I"]
    assert parts[1]["recompute"] == pytest.approx(sum(parts[0].values()), rel=0.01)
    attention = job(recompute_granularity="all-but-attention")
    saved = parts[1]["recompute"] - layer_parts(attention, H100)["I"]["recompute"]
    assert saved == pytest.approx(parts[0]["attention"])


def test_tensor_parallelism_over_nodes_is_dear() -> None:
    def tensor(size: int) -> float:
        return layer_parts(job(tensor_model_parallel_size=size, sequence_parallel=True), H100)["F"]["tensor"]

    assert tensor(16) > tensor(8) > tensor(4)


def test_lightseq_sends_less_than_the_ring_for_many_kv_heads() -> None:
    base = {"context_parallel_size": 8, "group_query_attention": False, "num_query_groups": None, "seq_length": 16384}
    slow = Rates(load("h100-80").with_network(1e9, 8))
    ring = layer_parts(job(cp_comm_type="p2p", tensor_model_parallel_size=8, **base), slow)["F"]["ring"]
    lightseq = layer_parts(job(cp_comm_type="lightseq", tensor_model_parallel_size=8, **base), slow)["F"]["ring"]
    assert lightseq < 0.7 * ring


def test_messages_that_are_not_overlapped_show_in_every_action() -> None:
    plain = job(pipeline_model_parallel_size=8, tensor_model_parallel_size=8, global_batch_size=64)
    shown = dataclasses.replace(plain, software=dataclasses.replace(plain.software, overlap_messages=False))
    message = message_seconds(plain, H100)
    more = step_time(shown, H100).seconds - step_time(plain, H100).seconds
    each = 2 * plain.microbatches * message  # those that fill and drain the pipeline showed before, too
    assert 0.8 * each <= more <= each + 4 * plain.layout.pp * message


def test_gradients_after_the_backward() -> None:
    plain = job(tensor_model_parallel_size=8, data_parallel_sharding_strategy="optim")
    software = dataclasses.replace(plain.software, overlap_gradients=False, whole_gradients=True)
    parts = step_time(dataclasses.replace(plain, software=software), H100).parts
    ranks, parameters = Group(8, 8), plain.rank_parameters(0)
    sums = H100.collective(ranks, software.gradient_bytes * parameters, "reduce")
    assert parts["data"] == pytest.approx(sums + H100.collective(ranks, 2 * parameters))
    assert parts["data"] > step_time(plain, H100).parts["data"]
