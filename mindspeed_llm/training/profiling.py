"""`--profile`: a trace of some iterations of some ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.config.profiling import ProfilingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.training.hooks import LoopHook, Wish

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop

EVERY_RANK = -1


class Profiler(LoopHook):
    """Traces iterations start + 1 ... end of this rank, or to the end of training.

    Raises:
        UserError: a rank that is to trace does not exist.
    """

    def __init__(self, options: ProfilingConfig) -> None:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        absent = [str(number) for number in options.profile_ranks if number >= world_size]
        if options.profile and absent:
            raise UserError(
                f"--profile-ranks: {', '.join(absent)} is wrong, because the run has {world_size} ranks; "
                f"legal: 0 to {world_size - 1}, or {EVERY_RANK} for all"
            )
        self.options, self.rank = options, rank
        self.chosen = options.profile and bool({rank, EVERY_RANK} & set(options.profile_ranks))
        self._running, self._begin = None, 0

    def before_batch(self, loop: TrainingLoop) -> None:
        """Begin when enough iterations are over; in a run that goes on from a checkpoint, maybe at once."""
        now, end = loop.progress.iteration, self.options.profile_step_end
        due = self.options.profile_step_start <= now and (end < 0 or now < end)
        if self.chosen and self._running is None and due:
            self._begin = now
            self._running = accelerator.current().profiler(self.options, f"rank{self.rank}")
            self._running.start()

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """End when enough iterations are over."""
        if self._running is not None and loop.progress.iteration == self.options.profile_step_end:
            self._stop(loop.progress.iteration)
        return Wish.NOTHING

    def close(self, iteration: int) -> None:
        """Training is over after `iteration` iterations: write a trace that is under way, or say that there is none."""
        if self._running is not None:
            self._stop(iteration)
        elif self.chosen and self._begin == 0 and iteration <= self.options.profile_step_start:
            print(
                f" nothing was traced: training ended after iteration {iteration}, and --profile-step-start is "
                f"{self.options.profile_step_start}",
                flush=True,
            )

    def _stop(self, iteration: int) -> None:
        accelerator.current().synchronize()
        self._running.stop()
        self._running = None
        self.chosen = False
        folder = self.options.profile_save_path
        print(f" traced iterations {self._begin + 1} to {iteration} of rank {self.rank}: {folder}", flush=True)
