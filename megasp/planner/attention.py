"""Which attention kernel a plan names: the fastest of PyTorch's own that the GPU's file has rates of and the run can
use; and what other kernels would gain."""

from dataclasses import replace

from megasp.config.kernels import ATTENTION_KERNELS, PREFERENCE, choose_kernel
from megasp.config.schema import Config
from megasp.planner.hardware import Hardware
from megasp.planner.job import Job
from megasp.planner.rates import Rates
from megasp.planner.step_time import StepTime, step_time

WORTH = 1.005
"""A kernel that makes a step less than so much faster is not worth a flag."""


def usable(config: Config, hardware: Hardware) -> list[str]:
    """Names of kernels with rates of their own that serve the run. cuDNN's takes a call for each document of a sample,
    and is left out where documents do not see each other."""
    model, training = config.model, config.training
    return [
        name
        for name in hardware.attention
        if not ATTENTION_KERNELS[name].refusal("cuda", training.compute_dtype, model.attention_dropout, model.head_dim)
        and not (name == "fused" and config.data.reset_attention_mask)
    ]


def fastest(config: Config, hardware: Hardware) -> str | None:
    """What --attention-backend is best given; None where what it means already is as fast."""
    model, training, rates = config.model, config.training, Rates(hardware)
    dropout = model.attention_dropout
    now, _ = choose_kernel(training.attention_backend, "cuda", training.compute_dtype, dropout, model.head_dim)

    def seconds(name: str) -> float:
        forward, backward = (
            rates.attention(name, flops, flops > 1, model.head_dim, training.seq_length) for flops in (1.0, 2.5)
        )
        return forward + backward

    own = [name for name in usable(config, hardware) if name in PREFERENCE]
    if now not in own:
        return None
    best = min(own, key=seconds)
    return best if seconds(best) * WORTH < seconds(now) else None


def compared(time: StepTime, config: Config, hardware: Hardware) -> list[str]:
    """What the kernel of an answer gains, and what others would."""
    model, training, job = config.model, config.training, time.job
    kernel = job.software.attention
    lines = []
    if training.attention_backend == kernel != "unfused":
        dropout = model.attention_dropout
        auto, _ = choose_kernel("auto", "cuda", training.compute_dtype, dropout, model.head_dim)
        if auto not in (None, kernel):
            gain = _with_kernel(job, auto, hardware).seconds / time.seconds - 1
            lines.append(
                f"attention by {ATTENTION_KERNELS[kernel].description} (--attention-backend {kernel}, not run on a GPU "
                f"yet); {gain:+.1%} by auto, which is {auto}"
            )
    for name in usable(config, hardware):
        seconds = _with_kernel(job, name, hardware).seconds
        if seconds * WORTH < time.seconds:
            needs = ATTENTION_KERNELS[name].module
            lines.append(
                f"attention by {ATTENTION_KERNELS[name].description} (--attention-backend {name}"
                f"{f', where module {needs} is installed' if needs else ''}): {seconds / time.seconds - 1:+.1%}"
            )
    return lines


def _with_kernel(job: Job, kernel: str, hardware: Hardware) -> StepTime:
    software = replace(job.software, attention=kernel, repeats_kv=kernel == "fused")
    return step_time(replace(job, software=software), Rates(hardware))
