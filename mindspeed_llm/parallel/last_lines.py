"""The last lines that a process printed, kept so that they can stand beside its failure."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

KEPT_LINES = 12
# Longer lines (a progress bar's, a tensor's) are cut.
LINE_WIDTH = 400


class LastLines:
    """The last lines written to the streams it listens to."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.count = 0
        self._begun, self._stopped = "", False

    def hear(self, text: str) -> None:
        """Text was printed."""
        if self._stopped:
            return
        *whole, self._begun = (self._begun + text).split("\n")
        self._begun = self._begun[-10 * LINE_WIDTH :]
        for line in whole:
            # What a carriage return has overwritten was not the line.
            if shown := line.rstrip("\r").rpartition("\r")[2].rstrip():
                self.lines.append(shown[:LINE_WIDTH])
                self.count += 1

    def stop(self) -> None:
        """Keep what there is: the traceback of a failure would push out what led to it."""
        self._stopped = True

    def text(self) -> str:
        """The lines kept, oldest first."""
        return "\n".join(list(self.lines))


class _Listened:
    """A stream that tells what is written to it; everything else is the stream's own."""

    def __init__(self, stream: TextIO, lines: LastLines) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        self._lines.hear(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def listening() -> Iterator[LastLines]:
    """Keep the last lines of stdout and stderr while the body runs."""
    lines = LastLines()
    before = sys.stdout, sys.stderr
    now = _Listened(sys.stdout, lines), _Listened(sys.stderr, lines)
    sys.stdout, sys.stderr = now  # type: ignore[assignment]
    try:
        yield lines
    finally:
        if (sys.stdout, sys.stderr) == now:
            sys.stdout, sys.stderr = before
