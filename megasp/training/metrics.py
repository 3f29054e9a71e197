"""What a run tells about itself: a metrics file, TensorBoard events, and lines on the console.

The metrics file holds strict JSON, a line for each step and each evaluation, written as they happen:

    {"step": 120, "loss": 5.123412, "grad_norm": 0.87, "lr": 0.0012, "tokens": 491520, "tokens_per_s": 12345.6,
     "tflops_per_device": 0.12, "mfu": null, "memory_gib": 0.43, "loss_scale": null, "layout": "tp2-pp1-u2-r1-dp1"}
    {"step": 120, "validation_loss": 5.2, "layout": "tp2-pp1-u2-r1-dp1"}

`step` counts finished steps, `tokens` those trained since the beginning. Floats keep full precision. What has no value
(the MFU of a CPU, a loss scale without fp16), or none that JSON can say (NaN, infinity), is null.
"""

import json
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from megasp import log
from megasp.data.atomic_files import AtomicFiles
from megasp.model.flops import mfu, tflops_per_device


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change during a run.

    Args:
        layout: name of the parallel layout.
        devices: ranks that share the work.
        device: this rank's; its memory is reported.
        flops_per_token: see `megasp.model.flops`.
        peak_tflops: of one device; None if unknown.
        train_steps: steps of the whole run.
        start_step: finished steps of the checkpoint that the run resumes from.
    """

    layout: str
    devices: int
    device: torch.device
    flops_per_token: float
    peak_tflops: float | None
    train_steps: int
    start_step: int = 0


class Metrics:
    """Writes the metrics of a run; on ranks other than 0 it does nothing.

    Lines of an earlier attempt past `run.start_step` are dropped first, so the file of a resumed run has the same steps
    and losses as that of an unbroken one (and a run that starts anew starts the file anew).

        with Metrics(run, file=Path("ckpt/metrics.jsonl"), log_interval=10) as metrics:
            metrics.step(1, loss=9.1, grad_norm=1.3, lr=1e-4, tokens=4096, read=4096, seconds=0.3)
            metrics.validation(1, loss=9.2)

    Args:
        file: the metrics file; None for none.
        tensorboard_dir: directory of event files; None for none. Tags that Megatron-LM has carry its names.
        log_interval: steps between console lines; the first step and the last have one, too.
    """

    def __init__(
        self, run: Run, *, file: Path | None = None, tensorboard_dir: Path | None = None, log_interval: int = 100
    ) -> None:
        self._run, self._log_interval, self._speaks = run, log_interval, log.rank() == 0
        self._since_line = (0, 0.0, 0)  # steps, seconds, tokens since the last console line
        self._file: IO[str] | None = None
        self._board: Any = None
        if self._speaks and file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            drop_later_lines(file, run.start_step)
            self._file = file.open("a", buffering=1)
        if self._speaks and tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            # purge_step hides the events of an earlier attempt, as above.
            self._board = SummaryWriter(str(tensorboard_dir), purge_step=run.start_step + 1)

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float | None,
        lr: float,
        tokens: int,
        read: int,
        seconds: float,
        loss_scale: float | None = None,
        decoupled_lr: float | None = None,
    ) -> None:
        """Record a finished step.

        Args:
            step: finished steps, this one included.
            lr: the rate that this step used.
            tokens: trained since the beginning, this step's included; masked targets do not count.
            read: tokens that went through the model in this step, from which speed is counted.
            seconds: what the step took.
            loss_scale: that of fp16.
            decoupled_lr: the rate of embedding and output layer, where they have their own.
        """
        if not self._speaks:
            return
        tokens_per_s, tflops = self._speed(read, seconds)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": tokens_per_s,
            "tflops_per_device": tflops,
            "mfu": mfu(tflops, self._run.peak_tflops),
            "memory_gib": peak_memory_gib(self._run.device),
            "loss_scale": loss_scale,
        } | ({} if decoupled_lr is None else {"decoupled_lr": decoupled_lr})
        self._write(record)
        self._to_board(
            step,
            {
                "lm loss": loss,
                "grad-norm": grad_norm,
                "learning-rate": lr,
                "throughput": tflops,
                "tokens": tokens,
                "tokens-per-second": tokens_per_s,
                "memory-gib": record["memory_gib"],
                "loss-scale": loss_scale,
                "decoupled-learning-rate": decoupled_lr,
            },
        )
        steps, past_seconds, past_tokens = self._since_line
        self._since_line = (steps + 1, past_seconds + seconds, past_tokens + read)
        if step % self._log_interval == 0 or step in (self._run.start_step + 1, self._run.train_steps):
            log.info(self._line(record))
            self._since_line = (0, 0.0, 0)

    def validation(self, step: int, *, loss: float, name: str = "validation") -> None:
        """Record the loss of the held-out set `name` after `step` finished steps."""
        if not self._speaks:
            return
        perplexity = math.exp(min(loss, 700.0))  # exp overflows past 709
        self._write({"step": step, f"{name}_loss": loss})
        self._to_board(step, {f"lm loss {name}": loss, f"lm loss {name} ppl": perplexity})
        log.info(f"step {step}/{self._run.train_steps} | {name} loss {loss:.4f} | perplexity {perplexity:.2f}")

    def close(self) -> None:
        """Finish the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _speed(self, tokens: int, seconds: float) -> tuple[float, float]:
        """Tokens per second of all devices together, TFLOP/s of each."""
        tokens_per_s = tokens / max(seconds, 1e-9)
        return tokens_per_s, tflops_per_device(tokens_per_s, self._run.flops_per_token, self._run.devices)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(values | {"layout": self._run.layout}, allow_nan=False) + "\n")

    def _to_board(self, step: int, values: dict[str, float | None]) -> None:
        if self._board is None:
            return
        for tag, value in values.items():
            if value is not None:
                self._board.add_scalar(tag, value, step)
        self._board.flush()

    def _line(self, record: dict[str, Any]) -> str:
        """One step for a person; speeds are means since the last line."""
        steps, seconds, tokens = self._since_line
        tokens_per_s, tflops = self._speed(tokens, seconds)
        used = mfu(tflops, self._run.peak_tflops)
        share = "n/a" if used is None else f"{used:.1%}"
        norm = record["grad_norm"]
        return " | ".join(
            [
                f"step {record['step']}/{self._run.train_steps}",
                f"loss {record['loss']:.4f}",
                f"lr {record['lr']:.1e}",
                f"grad norm {'n/a' if norm is None else format(norm, '.2f')}",
                *([] if record["loss_scale"] is None else [f"loss scale {record['loss_scale']:g}"]),
                f"{tokens_per_s:,.0f} tokens/s",
                f"{tflops:.{0 if tflops >= 100 else 2}f} TFLOP/s per device (MFU {share})",
                f"{record['memory_gib']:.2f} GiB",
                f"{duration((self._run.train_steps - record['step']) * seconds / steps)} left",
            ]
        )


def drop_later_lines(file: Path, step: int) -> None:
    """Rewrite a metrics file without the lines past `step`, and without what a crash left half-written. Atomic."""
    if not file.exists():
        return
    with file.open(errors="replace") as lines, AtomicFiles(file, overwrite=True) as kept:
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.files[0].write(line.rstrip("\n").encode() + b"\n")
            except (ValueError, KeyError, TypeError):  # the line that a crash cut
                continue


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: by tensors on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """A time span for a person: 45 s, 8 min, 5 h 20 min, 3 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
