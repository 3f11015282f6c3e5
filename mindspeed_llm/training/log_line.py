"""An iteration's figures: Megatron's log line, so that existing tools parse it, and the same by name for every sink."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class IterationLog:
    """What is known after a step (averaged over the log interval where a rate or a loss).

    Attributes:
        elapsed: seconds per iteration.
        tokens, trained_tokens: per iteration over all processes, padding not counted.
        epoch: passes over the training data so far; None where there is no such thing.
        skipped_iterations: without an update so far, for whatever reason.
        nan_iterations: those of them whose loss or gradient was not finite.
        skipped_samples: left out so far.
        flops: model FLOPs per iteration over all processes.
        peak_flops: peak FLOP/s of one device, None when unknown.
        device_memory: peak bytes of tensors on this process's device, None where that is not measured.
        host_memory: resident bytes of this process.
        further_losses: losses beside the language model's, by name.
        monitored: figures measured on request, by name.
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
    log_memory: bool = False
    trained_tokens: float = 0.0
    epoch: float | None = None
    nan_iterations: int = 0
    skipped_samples: int = 0
    device_memory: int | None = None
    host_memory: int | None = None
    further_losses: Mapping[str, float] = field(default_factory=dict)
    monitored: Mapping[str, float] = field(default_factory=dict)

    @property
    def tflops_per_device(self) -> float:
        """Achieved model TFLOP/s on each device."""
        return self.flops / self.elapsed / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, None on devices whose peak is unknown."""
        return None if self.peak_flops is None else self.tflops_per_device * 1e12 / self.peak_flops


PARAMS_NORM, ZEROS_IN_GRADIENT = "params-norm", "num-zeros"


def figures(log: IterationLog) -> dict[str, float]:
    """Everything that is recorded of an iteration, by name: Megatron's TensorBoard tags where it has one.

    The names are the same in TensorBoard, W&B, SwanLab and the JSONL file. What is not known here is left out.
    """
    found = {
        "lm loss": log.loss,
        **log.further_losses,
        "grad-norm": log.grad_norm,
        "learning-rate": log.learning_rate,
        "loss-scale": log.loss_scale,
        "batch-size": log.global_batch_size,
        "iteration-time": log.elapsed,
        "tokens-per-second": log.tokens / log.elapsed,
        "samples-per-second": log.samples / log.elapsed,
        "throughput": log.tflops_per_device,
        "mfu": log.mfu,
        "trained-token-share": log.trained_tokens / log.tokens if log.tokens else None,
        "consumed-samples": log.consumed_samples,
        "epoch": log.epoch,
        "skipped-iterations": log.skipped_iterations,
        "skipped-train-samples": log.skipped_samples,
        "nan-iterations": log.nan_iterations,
        "mem-max-allocated-bytes": log.device_memory,
        "mem-resident-bytes": log.host_memory,
        **log.monitored,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def format_log_line(log: IterationLog, now: float | None = None) -> str:
    """The line for one log interval."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    parts = [
        f" [{stamp}] iteration {log.iteration:8d}/{log.train_iters:8d}",
        f"consumed samples: {log.consumed_samples:12d}",
    ]
    if log.skipped_samples:
        parts.append(f"skipped samples: {log.skipped_samples:12d}")
    parts.append(f"elapsed time per iteration (ms): {log.elapsed * 1000:.1f}")
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
    ]
    if ZEROS_IN_GRADIENT in log.monitored:
        parts.append(f"num zeros: {log.monitored[ZEROS_IN_GRADIENT]:.0f}")
    if PARAMS_NORM in log.monitored:
        parts.append(f"params norm: {log.monitored[PARAMS_NORM]:.3f}")
    if log.log_memory:
        parts += _memory(log)
    parts += [
        f"number of skipped iterations: {log.skipped_iterations:3d}",
        f"number of nan iterations: {log.nan_iterations:3d}",
    ]
    return " | ".join(parts) + " |"


def _memory(log: IterationLog) -> list[str]:
    known = (("max memory allocated (GB)", log.device_memory), ("resident memory (GB)", log.host_memory))
    return [f"{name}: {value / 1e9:.2f}" for name, value in known if value is not None]
