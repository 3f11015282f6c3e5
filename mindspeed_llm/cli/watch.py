"""`python -m mindspeed_llm watch DIR`: a run in the terminal, from its metrics.jsonl alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.training.monitor.jsonl import read_lines

# Figure -> how its curve is called; the pictures of a terminal and of --png show these.
CURVES = {
    "lm loss": "loss",
    "grad-norm": "gradient norm",
    "learning-rate": "learning rate",
    "tokens-per-second": "tokens/s",
}
VALIDATION = "lm loss validation"
WARNINGS_SHOWN = 5
REFRESH_SECONDS = 2.0
# A run whose log lines stay away for this many of its usual intervals, and at least a minute, is called silent.
SILENT_INTERVALS, SILENT_SECONDS = 10, 60.0


@dataclass
class RunView:
    """What a metrics file says of a run.

    Attributes:
        start: facts of the last start.
        figures: name -> (iteration, value) pairs.
        latest: the last line's figures.
        times: (iteration, seconds since the epoch) of the log lines since the last start.
        checkpoint: the last one's line, None before the first.
        warnings: (iteration, text).
    """

    start: Mapping[str, Any] = field(default_factory=dict)
    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    latest: Mapping[str, Any] = field(default_factory=dict)
    times: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: Mapping[str, Any] | None = None
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of the file."""
        if line["kind"] == "start":
            self.start, self.times = line, []
        elif line["kind"] == "warning":
            self.warnings.append((line["iteration"], line["text"]))
        elif line["kind"] == "checkpoint":
            self.checkpoint = line
        elif line["kind"] == "metrics":
            for name, value in line.items():
                if name not in ("kind", "iteration", "time"):
                    self.figures.setdefault(name, []).append((line["iteration"], value))
            if "lm loss" in line:
                self.latest = line
                self.times.append((line["iteration"], line["time"]))

    @property
    def iteration(self) -> int:
        """The last one logged."""
        return self.latest.get("iteration", self.start.get("iteration", 0))

    def seconds_per_iteration(self) -> float | None:
        """Mean over the last 50 log lines, evaluations and saves included; None before the second."""
        (first, begun), (last, now) = (self.times[-50:] or [(0, 0.0)])[0], (self.times or [(0, 0.0)])[-1]
        return (now - begun) / (last - first) if last > first else None

    def seconds_left(self) -> float | None:
        """Until the last iteration, None where that cannot be told yet."""
        pace, total = self.seconds_per_iteration(), self.start.get("train_iters")
        return None if pace is None or total is None else pace * max(total - self.iteration, 0)

    def state(self, now: float) -> str:
        """Whether it has begun, runs, is silent or is finished."""
        if not self.latest:
            return "no log line yet"
        if self.iteration >= self.start.get("train_iters", math.inf):
            return "finished"
        silence = now - self.latest["time"]
        interval = self.times[-1][1] - self.times[-2][1] if len(self.times) > 1 else 0.0
        if silence > max(SILENT_INTERVALS * interval, SILENT_SECONDS):
            return f"silent for {duration(silence)}: no log line came"
        return "running"


def read_run(place: str) -> RunView:
    """The run whose metrics file is `place`, or metrics.jsonl in the directory `place`.

    Raises:
        UserError: there is no such file.
    """
    path = Path(place) / "metrics.jsonl" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(
            f"watch: {place} is wrong, because there is no file {path}; legal: the --save directory of a run, or its "
            "--metrics-jsonl file"
        )
    view = RunView()
    for line in read_lines(path):
        view.add(line)
    return view


def summary(view: RunView, now: float) -> list[tuple[str, str]]:
    """What is said of a run beside its curves: (title, text)."""
    latest, total = view.latest, view.start.get("train_iters")
    rows = [("state", view.state(now))]
    share = f" ({100 * view.iteration / total:.1f} %)" if total else ""
    rows.append(("iteration", f"{view.iteration:,} of {total:,}{share}" if total else f"{view.iteration:,}"))
    left = view.seconds_left()
    if left:
        rows.append(
            ("time left", f"{duration(left)}, until {time.strftime('%Y-%m-%d %H:%M', time.localtime(now + left))}")
        )
    for name, title, form in SHOWN:
        if name in latest:
            rows.append((title, form(latest[name])))
    if VALIDATION in view.figures:
        iteration, value = view.figures[VALIDATION][-1]
        rows.append(("validation loss", f"{value:.4f} at iteration {iteration:,}"))
    if view.checkpoint is not None:
        age = duration(now - view.checkpoint["time"])
        rows.append(("checkpoint", f"iteration {view.checkpoint['iteration']:,}, {age} ago"))
    else:
        rows.append(("checkpoint", "none yet"))
    return rows


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


SHOWN = (
    ("lm loss", "loss", "{:.4f}".format),
    ("grad-norm", "gradient norm", "{:.3f}".format),
    ("learning-rate", "learning rate", "{:.3e}".format),
    ("tokens-per-second", "tokens/s", "{:,.0f}".format),
    ("mfu", "MFU", "{:.1%}".format),
    ("mem-max-allocated-bytes", "device memory", _gigabytes),
    ("mem-resident-bytes", "host memory", _gigabytes),
    ("epoch", "epoch", "{:.3f}".format),
    ("skipped-iterations", "skipped iterations", "{:.0f}".format),
)
"""Figure, title and form of what the summary shows."""


def duration(seconds: float) -> str:
    """ "5 s", "3 min", "2 h 10 min", "4 d 3 h"."""
    seconds = max(int(seconds), 0)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds} s"


def chart(points: Iterable[tuple[int, float]], width: int, height: int) -> list[str]:
    """A curve of braille dots, `width` x `height` characters of 2 x 4 dots; values that are not finite leave gaps."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return [" " * width] * height
    first, last = finite[0][0], max(finite[-1][0], finite[0][0] + 1)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    span = (high - low) or 1.0
    places = [
        (round((x - first) / (last - first) * (2 * width - 1)), round((high - y) / span * (4 * height - 1)))
        for x, y in finite
    ]
    # Braille cells: dots 1-3 and 7 on the left from top to bottom, 4-6 and 8 on the right.
    dots = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
    cells = [[0] * width for _ in range(height)]
    for (x, y), (next_x, next_y) in zip(places, [*places[1:], places[-1]]):
        steps = max(abs(next_x - x), abs(next_y - y), 1)
        for step in range(steps + 1):
            column, row = x + round((next_x - x) * step / steps), y + round((next_y - y) * step / steps)
            cells[row // 4][column // 2] |= dots[column % 2][row % 4]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def picture(view: RunView, now: float, width: int) -> Any:
    """The whole screen, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for title, text in summary(view, now):
        facts.add_row(Text(title, style="bold"), Text(text))
    curves = Table.grid(padding=(0, 2))
    cells = [
        _curve(view.figures[name], title, (width - 4) // 2) for name, title in CURVES.items() if name in view.figures
    ]
    for left, right in zip(cells[::2], [*cells[1::2], ""]):
        curves.add_row(left, right)
    warnings = [
        Text(f"warning at iteration {iteration}: {text}", style="yellow")
        for iteration, text in view.warnings[-WARNINGS_SHOWN:]
    ]
    return Group(facts, Text(""), curves, *warnings)


def _curve(points: list[tuple[int, float]], title: str, width: int) -> Any:
    from rich.text import Text

    finite = [y for _, y in points if math.isfinite(y)]
    span = f"{min(finite):.4g} to {max(finite):.4g}" if finite else "not finite"
    lines = chart(points, width, 6)
    return Text(f"{title}: {span}\n", style="bold").append("\n".join(lines), style="not bold cyan")


def draw(view: RunView, path: Path) -> None:
    """The curves as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), dpi=110, sharex=True)
    for (name, title), axis in zip(CURVES.items(), axes.flat):
        if name in view.figures:
            axis.plot(*zip(*view.figures[name]), linewidth=1.3, label="training")
        if name == "lm loss" and VALIDATION in view.figures:
            axis.plot(*zip(*view.figures[VALIDATION]), "o-", label="validation")
            axis.legend()
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def watch(place: str, once: bool, png: str | None) -> int:
    """Show a run until it is finished or the user stops; once without a terminal, with `once` or with `png`."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    view = read_run(place)
    if png is not None:
        draw(view, Path(png))
        console.print(f"wrote {png}", highlight=False)
        return 0
    if once or not console.is_terminal:
        console.print(picture(view, time.time(), console.width))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while view.state(time.time()) != "finished":
                live.update(picture(view, time.time(), console.width), refresh=True)
                time.sleep(REFRESH_SECONDS)
                view = read_run(place)
        except KeyboardInterrupt:
            pass
    console.print(picture(view, time.time(), console.width))
    return 0
