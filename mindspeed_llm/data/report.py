"""What preprocessing did, in numbers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mindspeed_llm.data.handlers.base import ChunkResult
from mindspeed_llm.errors import UserError

SHOWN_BAD_ROWS = 5
PROGRESS_SECONDS = 10.0


@dataclass
class Report:
    """Counts of one preprocessing run.

    Attributes:
        prefix: where the output lies.
        rows: rows read; `documents` of them were written, in `packed_rows` rows when packed.
        tokens, trained_tokens: written tokens (padding not counted), and those with a loss.
        bad: (`file:line`, reason) of the first bad rows; `num_bad` counts all.
        dropped: rows left out, by reason.
        length_counts: [k] documents with 2**(k-1) <= tokens < 2**k.
    """

    prefix: str
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    packed_rows: int | None = None
    num_bad: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    length_counts: np.ndarray = field(default_factory=lambda: np.zeros(32, np.int64))
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, result: ChunkResult, max_bad_rows: int) -> None:
        """Count one chunk.

        Raises:
            UserError: more than `max_bad_rows` bad rows so far.
        """
        self.rows += result.num_rows
        self.num_bytes += result.num_bytes
        self.trained_tokens += result.num_trained
        self.dropped.update(result.dropped)
        self.num_bad += len(result.bad)
        self.bad += result.bad[: SHOWN_BAD_ROWS - len(self.bad)] if len(self.bad) < SHOWN_BAD_ROWS else []
        if self.num_bad > max_bad_rows:
            origins: dict[str, list[str]] = {}
            for origin, reason in self.bad:
                origins.setdefault(reason, []).append(origin)
            shown = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in origins.items())
            raise UserError(
                f"input: {self.num_bad} of the first {self.rows} rows cannot be used ({shown}); legal: at most "
                f"{max_bad_rows}; try: correct them, or --max-bad-rows N to skip and count them"
            )

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Count written documents by their lengths in tokens."""
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.length_counts += np.bincount(np.ceil(np.log2(lengths + 1.0)).astype(int), minlength=32)

    def counts(self) -> dict[str, Any]:
        """What goes into the record: all that does not depend on the machine."""
        return {
            "rows": self.rows,
            "documents": self.documents,
            "packed_rows": self.packed_rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "bad_rows": self.num_bad,
            "dropped": dict(sorted(self.dropped.items())),
        }

    def print(self) -> None:
        """Show the numbers as a table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"preprocessed to {self.prefix}", show_header=False)
        table.add_row("rows read", f"{self.rows:,}")
        table.add_row("documents written", f"{self.documents:,}")
        if self.packed_rows is not None:
            table.add_row("packed into rows", f"{self.packed_rows:,}")
        table.add_row("tokens", f"{self.tokens:,}")
        table.add_row("trained tokens", f"{self.trained_tokens:,} ({self.trained_tokens / max(1, self.tokens):.1%})")
        table.add_row("bad rows skipped", f"{self.num_bad:,}")
        for reason, count in sorted(self.dropped.items()):
            table.add_row(f"dropped: {reason}" if "(kept)" not in reason else reason, f"{count:,}")
        for origin, reason in self.bad:
            table.add_row("bad row", f"{origin}: {reason}")
        most = max(1, int(self.length_counts.max()))
        for power in np.flatnonzero(self.length_counts).tolist():
            count = int(self.length_counts[power])
            bar = "#" * max(1, round(30 * count / most))
            table.add_row(f"length {2**power // 2}..{2**power - 1}", f"{count:>9,} {bar}")
        rate = self.num_bytes / 1e6 / max(self.seconds, 1e-9)
        table.add_row(
            "time", f"{self.seconds:.1f} s, {rate:.1f} MB/s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        )
        Console().print(table)


class Progress:
    """A bar on a terminal, otherwise a line every ten seconds.

    Args:
        total_bytes: size of the source, None when unknown.
    """

    def __init__(self, total_bytes: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        self._total = total_bytes
        self._start = self._last = time.monotonic()
        self._bar = None
        if Console().is_terminal:
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("rows", total=total_bytes)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, report: Report) -> None:
        """Show how far the report has come."""
        if self._bar:
            self._bar.update(self._task, completed=report.num_bytes, description=f"{report.rows:,} rows")
            return
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        rate = report.num_bytes / (now - self._start)
        left = f", {(self._total - report.num_bytes) / rate:.0f} s left" if self._total and rate else ""
        print(f"preprocess: {report.rows:,} rows, {report.tokens:,} tokens, {rate / 1e6:.1f} MB/s{left}", flush=True)
