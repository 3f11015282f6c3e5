"""The log line of an iteration: Megatron's, so that existing tools parse it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class IterationLog:
    """What is known after a step (averaged over the log interval where a rate or a loss).

    Attributes:
        elapsed: seconds per iteration.
        tokens: real tokens per iteration over all processes, padding not counted.
        flops: model FLOPs per iteration over all processes.
        peak_flops: peak FLOP/s of one device, None when unknown.
        further_losses: losses beside the language model's, by name.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    elapsed: float
    tokens: float
    samples: float
    learning_rate: float
    global_batch_size: int
    loss: float
    loss_scale: float
    grad_norm: float
    skipped_iterations: int
    flops: float
    devices: int
    peak_flops: float | None
    log_throughput: bool
    further_losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def tflops_per_device(self) -> float:
        """Achieved model TFLOP/s on each device."""
        return self.flops / self.elapsed / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, None on devices whose peak is unknown."""
        return None if self.peak_flops is None else self.tflops_per_device * 1e12 / self.peak_flops


def format_log_line(log: IterationLog, now: float | None = None) -> str:
    """The line for one log interval."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    parts = [
        f" [{stamp}] iteration {log.iteration:8d}/{log.train_iters:8d}",
        f"consumed samples: {log.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {log.elapsed * 1000:.1f}",
    ]
    if log.log_throughput:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {log.tflops_per_device:.1f}")
        if log.mfu is not None:
            parts.append(f"MFU (%): {log.mfu * 100:.1f}")
    parts += [
        f"tokens per second: {log.tokens / log.elapsed:.1f}",
        f"samples per second: {log.samples / log.elapsed:.1f}",
        f"learning rate: {log.learning_rate:.6E}",
        f"global batch size: {log.global_batch_size:5d}",
        f"lm loss: {log.loss:.6E}",
        *(f"{name}: {value:.6E}" for name, value in log.further_losses.items()),
        f"loss scale: {log.loss_scale:.1f}",
        f"grad norm: {log.grad_norm:.3f}",
        f"number of skipped iterations: {log.skipped_iterations:3d}",
        # Always 0: a loss or gradient that is not finite ends the run before this line.
        f"number of nan iterations: {0:3d}",
    ]
    return " | ".join(parts) + " |"
