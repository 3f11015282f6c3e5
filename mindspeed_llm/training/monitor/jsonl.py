"""Figures as a file of JSON objects, one a line: {"kind": "metrics", "iteration": 5, "time": 1.79e9, "lm loss": ...}.

`metrics` lines hold figures (of training, or of an evaluation); other kinds are what happened: `start`, `warning`,
`checkpoint`, `experts`. JSON has no infinity and no NaN, so they are the strings "inf", "-inf" and "nan".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_llm.training.monitor.sinks import Sink


class JsonLines(Sink):
    """A JSONL file that a resumed run continues.

    Args:
        path: made with its directory when it is not there.
        done: what the file holds about later iterations is moved to `<path>.superseded`, so that every iteration
            stands in the file once.
    """

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rewind(done)

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        self._append("metrics", iteration, {name: _plain(value) for name, value in figures.items()})

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        self._append(kind, iteration, facts)

    def _append(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "iteration": iteration, "time": round(time.time(), 3), **facts})
        # Opened for each line: the file may be moved or rewound meanwhile, and a reader sees whole lines.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rewind(self, iteration: int) -> None:
        """Keep what happened up to `iteration`; a line that a killed process left unfinished goes too."""
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        kept, later = [], []
        for line in text.decode("utf-8", errors="replace").splitlines():
            record = _parsed(line)
            if record is not None:
                (kept if record["iteration"] <= iteration else later).append(line + "\n")
        if "".join(kept).encode() == text:
            return
        if later:
            with self.path.with_name(self.path.name + ".superseded").open("a", encoding="utf-8") as file:
                file.writelines(later)
        aside = self.path.with_name(self.path.name + ".tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)

    def close(self) -> None:
        """Every line is in the file already."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, figures as numbers; a last line that is still being written is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parsed(line)
            if record is not None:
                yield {name: _number(value) for name, value in record.items()}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
