"""The training loop."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mindspeed_llm import accelerator
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.data import TrainingData, evaluation_iterations
from mindspeed_llm.training.evaluate import evaluate
from mindspeed_llm.training.flops import training_flops
from mindspeed_llm.training.guards.guards import REWIND, UPDATE, Guards, Verdict
from mindspeed_llm.training.hooks import LoopHook, Wish, collect_flags
from mindspeed_llm.training.log_line import IterationLog
from mindspeed_llm.training.report import Reporter
from mindspeed_llm.training.setup import TrainingModel
from mindspeed_llm.training.step import BatchResult, run_batch
from mindspeed_llm.training.update import apply_gradients


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        consumed_samples: passed in the order of training, left out ones included.
        skipped_iterations: without an update, for whatever reason.
        nan_iterations: those of them whose loss or gradient was not finite (an overflow of the loss scaling is none).
        skipped_samples: [first, end) ranges of `consumed_samples` whose batches were left out and stay so.
        rewinds: how often the run went back to a checkpoint because of what it computed.
        recent: the latest losses and gradient norms, where spikes of them are watched for.
        spiking: ranges of `consumed_samples` of the spikes in a row that the last iterations were.
        ailments: what is wrong with the state after this iteration; a healthy one has none.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    skipped_samples: list[list[int]] = field(default_factory=list)
    rewinds: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    spiking: list[list[int]] = field(default_factory=list)
    ailments: list[str] = field(default_factory=list)

    @property
    def num_skipped_samples(self) -> int:
        """Samples in `skipped_samples` that lie behind."""
        return sum(max(min(end, self.consumed_samples) - first, 0) for first, end in self.skipped_samples)


class Interval:
    """Sums over the iterations since the last log line."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.iterations = self.tokens = self.samples = 0
        self.trained_tokens = 0
        self.loss_sum = self.flops = 0.0
        self.further_losses: Counter[str] = Counter()

    def add(self, result: BatchResult, samples: int, flops: float) -> None:
        """One iteration."""
        self.iterations += 1
        self.tokens += result.tokens
        self.samples += samples
        if math.isfinite(result.loss):
            self.trained_tokens += result.trained_tokens
            self.loss_sum += result.loss * result.trained_tokens
        self.further_losses.update(result.further_losses)
        self.flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the body takes is no time of an iteration."""
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun


class TrainingLoop:
    """Iterations from `progress` to `train_iters`.

    Args:
        save: called with the progress when a checkpoint is due.
        hooks: what else happens at the points of an iteration.
        guards: what watches over the numbers; default: guards by the plan's options that cannot rewind.
    """

    def __init__(
        self,
        plan: Plan,
        model: TrainingModel,
        optimizer: Any,
        scheduler: Any,
        data: TrainingData,
        reporter: Reporter,
        progress: Progress,
        train_iters: int,
        save: Callable[[Progress], None] | None,
        hooks: Sequence[LoopHook] = (),
        guards: Guards | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer, self.scheduler = plan, model, optimizer, scheduler
        self.data, self.reporter, self.progress = data, reporter, progress
        self.train_iters, self.save, self.hooks = train_iters, save, hooks
        self.guards = guards or Guards(plan, model, data)
        self.eval_iters = evaluation_iterations(data, plan.config.training.eval_iters)
        self.used_learning_rate = 0.0

    def run(self) -> Progress:
        """Train until the end (or until a hook wants to leave), evaluating and saving on the way and at the end."""
        t, c = self.plan.config.training, self.plan.config
        interval, saved_at, evaluated_at = Interval(), -1, -1
        while self.progress.iteration < self.train_iters:
            before = self.progress.iteration
            result, grad_norm = self.step()
            if self.progress.iteration <= before:  # went back
                interval = Interval()
                continue
            interval.add(result, self.plan.global_batch_size, self.flops(result))
            now = self.progress.iteration
            if now % c.logging.log_interval == 0 or now == self.train_iters:
                self.log(interval, grad_norm)
                interval = Interval()
            if t.eval_interval and now % t.eval_interval == 0:
                with interval.paused():
                    self.evaluate()
                evaluated_at = now
            wish = self.wish()
            if self.save and wish:
                with interval.paused():
                    self.checkpoint()
                saved_at = now
            if Wish.LEAVE in wish:
                return self.progress
        if evaluated_at != self.progress.iteration:
            self.evaluate()
        if self.save and saved_at != self.progress.iteration:
            self.checkpoint()
        return self.progress

    def wish(self) -> Wish:
        """What the hooks ask for at the end of this iteration; leaving saves too."""
        wish = Wish.NOTHING
        for hook in self.hooks:
            wish |= hook.end_of_iteration(self)
        return wish

    def step(self) -> tuple[BatchResult, float]:
        """One iteration: forward, backward, optimizer step; or none, if the batch is left out or the run goes back.

        Raises:
            UserError: the guards stop the run; weights are those of the iteration before.
        """
        for hook in self.hooks:
            hook.before_batch(self)
        if self.guards.is_left_out(self.progress):
            return self._finish(BatchResult(math.nan, 0, 0, 0), math.nan, stepped=False)
        result = self.guards.run(self._batch(), self.progress)
        for hook in self.hooks:
            hook.after_backward(self, result)
        self.used_learning_rate = self.learning_rate()
        verdict = self.guards.judge(result, self.optimizer, self.progress)
        if verdict.action == UPDATE:
            self._update(verdict)
            return self._finish(result, verdict.grad_norm, stepped=True)
        if verdict.reason:
            self.warn(self.guards.refuse(verdict, self.progress))
        if verdict.action == REWIND:
            self._rewind()
            return result, verdict.grad_norm
        return self._finish(result, verdict.grad_norm, stepped=False)

    def _batch(self) -> Callable[[], BatchResult]:
        """Forward and backward of the next batch, as often as it is called; gradients are zero before the first."""
        from megatron.core import parallel_state

        micro = self.data.micro_batches(self.progress.consumed_samples, parallel_state.get_data_parallel_rank())
        for hook in self.hooks:
            hook.after_data(self)
        for wrapped in self.model.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        flags = partial(collect_flags, self.hooks)
        return lambda: run_batch(self.model.wrapped, micro, self.plan, forward_only=False, flags=flags)

    def _update(self, verdict: Verdict) -> None:
        if verdict.reason:
            self.warn(verdict.reason)
        for hook in self.hooks:
            hook.before_update(self)
        apply_gradients(self.optimizer, verdict.grad_norm)
        self.scheduler.step(increment=self.plan.global_batch_size)

    def _finish(self, result: BatchResult, grad_norm: float, stepped: bool) -> tuple[BatchResult, float]:
        self.progress.iteration += 1
        self.progress.skipped_iterations += not stepped
        self.progress.consumed_samples += self.plan.global_batch_size
        for hook in self.hooks:
            hook.after_step(self, result, grad_norm)
        if stepped:
            self.guards.after_update(self.optimizer, self.progress)
        return result, grad_norm

    def _rewind(self) -> None:
        came_from = self.progress.iteration + 1
        self.guards.rewind(self.progress)
        self.warn(f"rewind: from iteration {came_from} back to the checkpoint after {self.progress.iteration}")
        if self.reporter is not None:
            self.reporter.rewind(self.progress.iteration)

    def warn(self, text: str) -> None:
        """A warning in the log."""
        if self.reporter is not None:
            self.reporter.warn(text)

    def checkpoint(self) -> None:
        """Save, after the guards have looked at what is saved."""
        self.guards.before_save(self.optimizer, self.progress)
        self.save(self.progress)

    def flops(self, result: BatchResult) -> float:
        """Model FLOPs of an iteration."""
        return training_flops(
            self.plan.shape,
            tokens=result.tokens,
            attention_pairs=result.attention_pairs,
            output_tokens=result.trained_tokens,
            frozen_base=self.plan.adapters is not None,
        )

    def log(self, interval: Interval, grad_norm: float) -> None:
        """The log line over an interval."""
        accelerator.current().synchronize()
        n = interval.iterations
        elapsed = (time.perf_counter() - interval.start) / n
        monitored = dict(item for hook in self.hooks for item in hook.figures(self).items())
        self.reporter.iteration(
            IterationLog(
                iteration=self.progress.iteration,
                train_iters=self.train_iters,
                consumed_samples=self.progress.consumed_samples,
                elapsed=elapsed,
                tokens=interval.tokens / n,
                samples=interval.samples / n,
                learning_rate=self.used_learning_rate,
                global_batch_size=self.plan.global_batch_size,
                loss=interval.loss_sum / interval.trained_tokens if interval.trained_tokens else math.nan,
                further_losses={name: value / n for name, value in interval.further_losses.items()},
                loss_scale=float(self.optimizer.get_loss_scale()),
                grad_norm=grad_norm,
                skipped_iterations=self.progress.skipped_iterations,
                nan_iterations=self.progress.nan_iterations,
                skipped_samples=self.progress.num_skipped_samples,
                flops=interval.flops / n,
                devices=self.plan.world_size,
                peak_flops=accelerator.current().peak_flops(self.model.chunks[0].config.params_dtype),
                log_throughput=self.plan.config.logging.log_throughput,
                log_memory=self.plan.config.logging.log_memory,
                trained_tokens=interval.trained_tokens / n,
                epoch=self.progress.consumed_samples / self.data.samples_per_epoch,
                device_memory=accelerator.current().highest_memory_allocated() or None,
                host_memory=accelerator.current().resident_memory(),
                monitored=monitored,
            )
        )

    def learning_rate(self) -> float:
        """Of the first parameter group that has parameters on this rank (all groups share the schedule)."""
        every = self.optimizer.param_groups
        groups = [g for g in every if g.get("default_config", True)] or every  # LoRA+ has others of another rate
        groups = [g for g in groups if g["params"]] or groups
        return float(groups[0]["lr"])

    def evaluate(self) -> None:
        """Validation loss, if there is a validation part."""
        if self.eval_iters:
            found = evaluate(self.model.wrapped, self.data, self.plan, self.eval_iters)
            self.reporter.evaluation(self.progress.iteration, found.loss, found.trained_tokens)
