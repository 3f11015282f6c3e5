"""Telling the sinks of checkpoints once they are complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_llm.training.hooks import LoopHook
from mindspeed_llm.training.report import Reporter

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop


class SaveEvents(LoopHook):
    """A checkpoint that is written in the background appears, by being renamed, some iterations later."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.awaited: list[tuple[int, Path]] = []

    def begun(self, iteration: int, directory: Path) -> None:
        """A save of the state after `iteration` is complete once `directory` is there."""
        if self.reporter.active:
            self.awaited.append((iteration, directory))
            self.look()

    def before_batch(self, loop: TrainingLoop) -> None:
        """Look for what is awaited."""
        self.look()

    def look(self) -> None:
        """Tell of the checkpoints that have appeared."""
        for iteration, directory in [pair for pair in self.awaited if pair[1].is_dir()]:
            self.awaited.remove((iteration, directory))
            self.reporter.event("checkpoint", {"directory": str(directory)}, iteration)
