"""What a run shows while it trains: log lines or a progress bar, TensorBoard, and the loss curve as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.training.log_line import IterationLog, format_log_line


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
        tensorboard_dir: directory for TensorBoard events, None for none.
    """

    def __init__(
        self, *, active: bool, progress: str, tensorboard_dir: str | None, train_iters: int, done: int
    ) -> None:
        self.active = active
        self.history = LossHistory()
        self._bar: Any = None
        self._writer: Any = None
        if not active:
            return
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(tensorboard_dir)
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
        self.history.train.append((log.iteration, log.loss))
        if self._bar is not None:
            speed = f"{log.tokens / log.elapsed:,.0f} tokens/s"
            self._bar.update(self._task, completed=log.iteration, description=f"loss {log.loss:.4f}  {speed}")
        else:
            print(format_log_line(log), flush=True)
        if self._writer is not None:
            values = {
                "lm loss": log.loss,
                **log.further_losses,
                "learning-rate": log.learning_rate,
                "grad-norm": log.grad_norm,
                "loss-scale": log.loss_scale,
                "tokens-per-second": log.tokens / log.elapsed,
                "iteration-time": log.elapsed,
            }
            for name, value in values.items():
                self._writer.add_scalar(name, value, log.iteration)

    def evaluation(self, iteration: int, loss: float, trained_tokens: int) -> None:
        """One evaluation."""
        if not self.active:
            return
        self.history.valid.append((iteration, loss))
        self.say(
            f" validation loss at iteration {iteration} | lm loss: {loss:.6E} | trained tokens: {trained_tokens} |"
        )
        if self._writer is not None:
            self._writer.add_scalar("lm loss validation", loss, iteration)

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
        if self._writer is not None:
            self._writer.close()
        if loss_curve is not None:
            draw_loss_curve(self.history, Path(loss_curve))


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
