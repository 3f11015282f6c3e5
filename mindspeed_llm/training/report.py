"""What a run shows while it trains: log lines or a progress bar, figures for the sinks, and the loss curve."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm.training.log_line import IterationLog, figures, format_log_line

if TYPE_CHECKING:
    from mindspeed_llm.training.monitor.sinks import Sink


@dataclass
class LossHistory:
    """(iteration, value) pairs of what is drawn."""

    train: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)


class Reporter:
    """Where an iteration's figures go; does something on the logging rank only.

    Args:
        active: this process writes.
        progress: "bar", "lines", or "auto": a bar on a terminal and lines otherwise.
        sinks: where figures go beside the terminal.
        done: iterations before this run.
    """

    def __init__(self, *, active: bool, progress: str, train_iters: int, done: int, sinks: Sequence[Sink] = ()) -> None:
        self.active, self.sinks = active, sinks
        self.history = LossHistory()
        self._bar: Any = None
        self._last = done
        if not active:
            return
        if progress == "bar" or (progress == "auto" and sys.stdout.isatty()):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("training", total=train_iters, completed=done)

    def iteration(self, log: IterationLog) -> None:
        """One log interval."""
        if not self.active:
            return
        self._last = log.iteration
        self.history.train.append((log.iteration, log.loss))
        if self._bar is not None:
            speed = f"{log.tokens / log.elapsed:,.0f} tokens/s"
            self._bar.update(self._task, completed=log.iteration, description=f"loss {log.loss:.4f}  {speed}")
        else:
            print(format_log_line(log), flush=True)
        self._write(log.iteration, figures(log))

    def evaluation(self, iteration: int, loss: float, trained_tokens: int) -> None:
        """One evaluation."""
        if not self.active:
            return
        self.history.valid.append((iteration, loss))
        self.say(
            f" validation loss at iteration {iteration} | lm loss: {loss:.6E} | trained tokens: {trained_tokens} |"
        )
        # Perplexity is capped where Megatron caps it.
        self._write(iteration, {"lm loss validation": loss, "lm loss validation ppl": math.exp(min(20.0, loss))})

    def event(self, kind: str, facts: Mapping[str, Any], iteration: int | None = None) -> None:
        """Something that is not a figure, for the sinks that have a place for it.

        Args:
            kind: "start", "warning", "checkpoint" or what else there is.
            iteration: after which it happened; default: the last one that was logged.
        """
        if self.active:
            for sink in self.sinks:
                sink.event(kind, self._last if iteration is None else iteration, facts)

    def warn(self, text: str, iteration: int | None = None) -> None:
        """A line that begins with `warning:`, shown and recorded; `iteration` as in `event`."""
        self.say(f"warning: {text}")
        self.event("warning", {"text": text}, iteration)

    def rewind(self, iteration: int) -> None:
        """The run goes on after `iteration`, which is before what was reported last."""
        self.history.train = [point for point in self.history.train if point[0] <= iteration]
        self.history.valid = [point for point in self.history.valid if point[0] <= iteration]
        self._last = iteration
        if self.active:
            for sink in self.sinks:
                sink.rewind(iteration)

    def say(self, line: str) -> None:
        """A line that does not disturb the progress bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self, loss_curve: str | None) -> None:
        """Flush everything; with `loss_curve`, draw the history into that PNG file (and its figures beside it)."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.stop()
        for sink in self.sinks:
            sink.close()
        if loss_curve is not None:
            draw_loss_curve(self.history, Path(loss_curve))

    def _write(self, iteration: int, found: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(iteration, found)


def draw_loss_curve(history: LossHistory, path: Path) -> None:
    """Training and validation loss over iterations as a PNG, and the same figures as json beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, points, style in (("training", history.train, "-"), ("validation", history.valid, "o-")):
        if points:
            axes.plot(*zip(*points), style, label=name, linewidth=1.5)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    path.with_suffix(".json").write_text(json.dumps({"train": history.train, "valid": history.valid}), encoding="utf-8")
