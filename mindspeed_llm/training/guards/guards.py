"""What is done about a batch once its loss and gradient norm are known, and what is looked at besides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mindspeed_llm.config.guards import DEFAULT_REWINDS, LEGAL_POLICIES, policy_of
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.data import TrainingData
from mindspeed_llm.training.guards.batch_state import BatchState, router_buffers
from mindspeed_llm.training.guards.health import embedding_gradient_norm, embedding_gradient_squares
from mindspeed_llm.training.guards.nonfinite import Diagnosing, write_culprits
from mindspeed_llm.training.guards.repeat import Repeating
from mindspeed_llm.training.guards.replicas import check_replicas
from mindspeed_llm.training.guards.skipping import is_left_out, leave_out, read_skips, write_skip
from mindspeed_llm.training.guards.sources import SampleSource
from mindspeed_llm.training.guards.spikes import remember, spike_in
from mindspeed_llm.training.setup import TrainingModel, is_leader
from mindspeed_llm.training.step import BatchResult
from mindspeed_llm.training.update import gradient_norm

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import Progress

UPDATE, LEAVE_OUT, REWIND = "update", "leave out", "rewind"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a batch; alike on all ranks.

    Attributes:
        action: UPDATE, LEAVE_OUT (no step, the next iteration goes on) or REWIND.
        grad_norm: nan where none was computed.
        reason: one line about what is wrong; empty when nothing is, or nothing but the loss scale.
        nonfinite: the reason is a loss or gradient that is not finite.
    """

    action: str
    grad_norm: float
    reason: str = ""
    nonfinite: bool = False


class Guards:
    """Watches over one run.

    Nothing here adds a collective or waits for the device while all is well and no interval has come.

    Args:
        restore: loads the newest healthy checkpoint into model, optimizer and schedule and returns its progress, or
            raises a UserError; the plan asks for it only where something is saved.
    """

    def __init__(
        self, plan: Plan, model: TrainingModel, data: TrainingData, restore: Callable[[], Progress] | None = None
    ) -> None:
        self.plan, self.model, self.data, self.restore = plan, model, data, restore
        self.options = plan.config.guards
        self.policy, self.limit = policy_of(self.options.on_nonfinite)
        self.source = SampleSource(plan, data)
        self.directory = Path(plan.config.checkpoint.save) if plan.config.checkpoint.save else None
        self.state: BatchState | None = None
        self.embedding_squares: Any = None
        self.overflowed_at_smallest_scale = False

    def recall(self, progress: Progress) -> None:
        """Leave out, after a resume, what this run has left out before; collective."""
        if self.directory is None or progress.iteration == 0:
            return
        found = [read_skips(self.directory, self._order()) if is_leader() else None]
        dist.broadcast_object_list(found, src=0)
        for first, end in found[0]:
            leave_out(progress.skipped_samples, first, end)

    def is_left_out(self, progress: Progress) -> bool:
        """Whether the next batch is one to pass over."""
        return is_left_out(progress.skipped_samples, progress.consumed_samples, self.plan.global_batch_size)

    def run(self, batch: Callable[[], BatchResult], progress: Progress) -> BatchResult:
        """Forward and backward of the next batch, twice if it is time to compare.

        Raises:
            UserError: the two differ.
        """
        self.state = BatchState.capture(self._router_buffers)
        if not self._is_time(self.options.replay_batch_interval, progress.iteration + 1):
            return batch()
        return Repeating(self.plan, self.model).run(batch, self.state, self.where(progress))

    def judge(self, result: BatchResult, optimizer: Any, progress: Progress) -> Verdict:
        """What to do with the batch that has just run; weights, moments and schedule are untouched.

        Raises:
            UserError: it trains nothing.
        """
        if result.trained_tokens == 0:
            raise UserError(
                f"loss: no trained token in the global batch of {self.where(progress)}; weights are unchanged"
            )
        if not math.isfinite(result.loss):
            return self._nonfinite(math.nan, f"loss: {result.loss} at {self.where(progress)}")
        grad_norm = gradient_norm(optimizer)
        if grad_norm is None:
            return self._overflow(optimizer, progress)
        self.overflowed_at_smallest_scale = False
        if not math.isfinite(grad_norm):
            return self._nonfinite(grad_norm, f"gradient: norm {grad_norm} at {self.where(progress)}")
        if grad_norm == 0.0 and progress.iteration == 0:
            raise UserError(f"gradient: norm is exactly 0 at iteration 1, because {self._untrained()} has none")
        if self.options.embedding_local_norm_threshold is not None:
            self.embedding_squares = embedding_gradient_squares(self.model.chunks, optimizer)
        return self._spikes(result.loss, grad_norm, progress)

    def where(self, progress: Progress) -> str:
        """Iteration and samples for messages."""
        rows = self.data.sample_indices(progress.consumed_samples)
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        return f"iteration {progress.iteration + 1}, samples {shown} of {self.data.name}"

    def refuse(self, verdict: Verdict, progress: Progress) -> str:
        """Note that a batch is left out, and find out why; the line that says so.

        Random states and routers are taken back to where they were before it.

        Raises:
            UserError: the run is to stop, or has left out as many batches as it may.
        """
        reason = verdict.reason
        if verdict.nonfinite:
            progress.nan_iterations += 1
            reason = self._explain(verdict, progress)
        self.state.restore()
        first, size = progress.consumed_samples, self.plan.global_batch_size
        ranges = [[first, first + size]]
        if verdict.action == REWIND and not verdict.nonfinite:
            ranges = progress.spiking
        for begin, end in ranges:
            leave_out(progress.skipped_samples, begin, end)
            if self.directory is not None and is_leader():
                write_skip(self.directory, self._order(), progress.iteration + 1, begin, end, reason)
        return reason

    def rewind(self, progress: Progress) -> None:
        """Go back to the newest healthy checkpoint; what was left out and counted stays so.

        Raises:
            UserError: there is none, or the run has gone back as often as it may.
        """
        allowed = self.limit if self.policy == "rewind" else DEFAULT_REWINDS
        if progress.rewinds >= allowed:
            raise UserError(
                f"rewind: iteration {progress.iteration + 1} would be rewind {progress.rewinds + 1}, because the run "
                f"goes wrong again and again; legal: {allowed} in a run; try: another --lr, or --on-nonfinite rewind:N"
            )
        restored = self.restore()
        for first, end in progress.skipped_samples:
            leave_out(restored.skipped_samples, first, end)
        restored.nan_iterations, restored.rewinds = progress.nan_iterations, progress.rewinds + 1
        vars(progress).update(vars(restored))

    def before_save(self, optimizer: Any, progress: Progress) -> None:
        """Compare replicas and judge the state that is to be saved; collective.

        Raises:
            UserError: replicas differ.
        """
        if self.options.check_weight_hash_across_dp_replicas_interval is not None:
            check_replicas(self.plan, self.model, optimizer, progress.iteration)
        elif self.plan.adapters is not None:
            # A factor that is whole on every rank drifts apart where its gradient is not summed, and the checkpoint
            # would hold one of the copies.
            check_replicas(self.plan, self.model, optimizer, progress.iteration, trained_only=True)
        limit = self.options.embedding_local_norm_threshold
        if limit is not None and self.embedding_squares is not None:
            norm = embedding_gradient_norm(self.embedding_squares)
            if norm > limit:
                progress.ailments.append(f"gradient norm of the word embeddings {norm:.6g} is above {limit:g}")

    def after_update(self, optimizer: Any, progress: Progress) -> None:
        """Compare replicas when it is time.

        Raises:
            UserError: they differ.
        """
        if self._is_time(self.options.check_weight_hash_across_dp_replicas_interval, progress.iteration):
            check_replicas(self.plan, self.model, optimizer, progress.iteration)

    @cached_property
    def _router_buffers(self) -> list[Any]:
        return router_buffers(self.model.chunks)

    def _is_time(self, interval: int | None, iteration: int) -> bool:
        return interval is not None and iteration % interval == 0

    def _overflow(self, optimizer: Any, progress: Progress) -> Verdict:
        """A scaled gradient beyond fp16: the scale shrinks, unless it cannot."""
        o = self.plan.config.optimizer
        fixed, smallest = o.loss_scale is not None, float(optimizer.get_loss_scale()) <= o.min_loss_scale
        if fixed or (smallest and self.overflowed_at_smallest_scale):
            scale = f"loss scale {float(optimizer.get_loss_scale()):g}, the smallest"
            return self._nonfinite(math.nan, f"gradient: overflow at {scale}, at {self.where(progress)}")
        self.overflowed_at_smallest_scale = smallest
        return Verdict(LEAVE_OUT, math.nan)

    def _nonfinite(self, grad_norm: float, reason: str) -> Verdict:
        return Verdict(REWIND if self.policy == "rewind" else LEAVE_OUT, grad_norm, reason, nonfinite=True)

    def _spikes(self, loss: float, grad_norm: float, progress: Progress) -> Verdict:
        o, progress.ailments, found = self.options, [], []
        for name, value, threshold in (
            ("loss", loss, o.loss_spike_threshold),
            ("gradient norm", grad_norm, o.grad_norm_spike_threshold),
        ):
            if threshold is not None:
                window = progress.recent.setdefault(name, [])
                found.append(spike_in(name, value, window, threshold, o.spike_window))
                remember(window, value, o.spike_window)
        spikes = [spike for spike in found if spike]
        if not spikes:
            progress.spiking = []
            return Verdict(UPDATE, grad_norm)
        progress.ailments = spikes
        first = progress.consumed_samples
        progress.spiking = [*progress.spiking, [first, first + self.plan.global_batch_size]]
        reason = f"spike: {', '.join(spikes)} at {self.where(progress)}"
        enough = len(progress.spiking) >= o.spike_count
        if o.spike_action == "rewind" and enough:
            return Verdict(REWIND, grad_norm, reason)
        return Verdict(LEAVE_OUT if o.spike_action == "skip" else UPDATE, grad_norm, reason)

    def _explain(self, verdict: Verdict, progress: Progress) -> str:
        """What went wrong where, after a repetition of the batch; stops the run unless it may go on."""
        diagnosis = Diagnosing(self.plan, self.model, self.source).diagnose(progress.consumed_samples, self.state)
        files = []
        if self.directory is not None:
            files = write_culprits(self.directory, progress.iteration + 1, verdict.reason, diagnosis)
        texts = f"; whole texts in {', '.join(map(str, files))}" if files else ""
        said = f"{verdict.reason}; no step was taken, weights are unchanged; {diagnosis}{texts}"
        if self.policy == "stop":
            raise UserError(f"{said}; legal: finite numbers; try: --on-nonfinite {LEGAL_POLICIES}")
        if self.policy == "skip" and progress.nan_iterations > self.limit:
            raise UserError(
                f"{said}; {self.limit} batches were left out before; legal: --on-nonfinite {self.options.on_nonfinite}"
                "; try: a larger N, or look at the data and --lr"
            )
        return said

    def _untrained(self) -> str:
        names = [name for trained in self.model.trained for name in trained]
        more = f" and {len(names) - 3} more trained tensors" if len(names) > 3 else ""
        return f"{', '.join(names[:3]) or 'no tensor of this rank'}{more}"

    def _order(self) -> dict[str, Any]:
        """What the place of a sample in the order of training depends on."""
        c = self.plan.config
        return {
            "data": self.data.fingerprint(),
            "seed": c.data.seed,
            "shuffled": not c.training.no_shuffle,
            "seq_length": self.plan.seq_length,
        }
