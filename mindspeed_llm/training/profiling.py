"""`--profile`: a trace of some iterations of some ranks, and a page that sums it up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator.ranges import mark_running
from mindspeed_llm.config.profiling import EVERY_RANK, ProfilingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.training.hooks import LoopHook, Wish
from mindspeed_llm.training.trace.marks import Marks
from mindspeed_llm.training.trace.names import BETWEEN, DATA, OPTIMIZER, SCHEDULE
from mindspeed_llm.training.trace.page import page_beside, write_page
from mindspeed_llm.training.trace.reading import ASCEND_TRACE, TORCH_TRACE
from mindspeed_llm.training.trace.summary import summarize

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop
    from mindspeed_llm.training.step import BatchResult


class Profiler(LoopHook):
    """Traces iterations start + 1 ... end of this rank, or to the end of training.

    Iterations, phases and modules are named in the trace. Each traced rank reads its own trace when it is written and
    leaves a page beside it; nothing about it is collective.
    """

    def __init__(self, options: ProfilingConfig) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.options, self.rank = options, rank
        self.chosen = options.profile and bool({rank, EVERY_RANK} & set(options.profile_ranks))
        self._running, self._begin = None, 0
        self._marks, self._before = Marks(), set()

    def before_batch(self, loop: TrainingLoop) -> None:
        """Begin when enough iterations are over; in a run that goes on from a checkpoint, maybe at once."""
        now, end = loop.progress.iteration, self.options.profile_step_end
        due = self.options.profile_step_start <= now and (end < 0 or now < end)
        if self.chosen and self._running is None and due:
            self._begin, self._before = now, self._traces()
            self._running = accelerator.current().profiler(self.options, f"rank{self.rank}")
            self._running.start()
            mark_running(True)
            self._marks.open(loop.model.chunks)
        if self._running is not None:
            self._marks.iteration(now + 1)
            self._marks.phase(DATA)

    def after_data(self, loop: TrainingLoop) -> None:
        """Forward and backward passes and all that belongs to them."""
        self._phase(SCHEDULE)

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """The gradient's norm, the update and what watches over both."""
        self._phase(OPTIMIZER)

    def after_step(self, loop: TrainingLoop, result: BatchResult, grad_norm: float) -> None:
        """Log line, evaluation, checkpoint."""
        self._phase(BETWEEN)

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """End when enough iterations are over."""
        if self._running is not None and loop.progress.iteration == self.options.profile_step_end:
            self._stop(loop.progress.iteration)
        return Wish.NOTHING

    def close(self, iteration: int) -> None:
        """Training is over after `iteration` iterations: write a trace that is under way, or say that there is none."""
        if self._running is not None:
            self._stop(iteration)
        elif self.chosen:
            start, end = self.options.profile_step_start, self.options.profile_step_end
            print(
                f" nothing was traced: training ended after iteration {iteration} and did none of iterations "
                f"{start + 1} to {'the end' if end < 0 else end} (--profile-step-start, --profile-step-end)",
                flush=True,
            )

    def abandon(self) -> None:
        """After a failure: name nothing any more. A trace under way is lost, since to end it might wait for ever."""
        if self._running is not None:
            self._marks.close()
            mark_running(False)
            self._running = None

    def _phase(self, name: str) -> None:
        if self._running is not None:
            self._marks.phase(name)

    def _stop(self, iteration: int) -> None:
        accelerator.current().synchronize()
        self._marks.close()
        mark_running(False)
        self._running.stop()
        self._running = None
        self.chosen = False
        folder = self.options.profile_save_path
        print(f" traced iterations {self._begin + 1} to {iteration} of rank {self.rank}: {folder}", flush=True)
        print(f" {self._sum_up()}", flush=True)

    def _traces(self) -> set[Path]:
        """Traces of this rank in the folder; a name says of which rank it is."""
        folder = Path(self.options.profile_save_path)
        return {*folder.glob(f"rank{self.rank}.*{TORCH_TRACE}"), *folder.glob(f"rank{self.rank}_*/{ASCEND_TRACE}")}

    def _sum_up(self) -> str:
        """Write the page; a line that says where it lies, or why there is none."""
        new = sorted(self._traces() - self._before)
        if not new:
            return f"no summary of rank {self.rank}: no trace as text was written ({ASCEND_TRACE})"
        try:
            return f"summary of rank {self.rank}: {write_page([summarize(new[-1])], page_beside(new[-1]))}"
        except (UserError, OSError) as wrong:  # the trace is damaged or the disk is full; training is not
            return f"no summary of rank {self.rank}: {wrong}"
