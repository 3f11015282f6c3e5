"""Batches that are left out: which ranges of the order of training, and the record of them beside the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_llm.training.guards.sources import append_lines

RECORD_NAME = "skipped.jsonl"


def is_left_out(ranges: list[list[int]], consumed_samples: int, batch_size: int) -> bool:
    """Whether the batch after `consumed_samples` touches one of the [first, end) ranges."""
    return any(first < consumed_samples + batch_size and consumed_samples < end for first, end in ranges)


def leave_out(ranges: list[list[int]], first: int, end: int) -> None:
    """Add a range once."""
    if [first, end] not in ranges:
        ranges.append([first, end])


def write_skip(directory: Path, order: dict[str, Any], iteration: int, first: int, end: int, reason: str) -> None:
    """Add a range to the record.

    Args:
        order: what the positions of samples depend on (data, seed, ...).
    """
    row = {"iteration": iteration, "first": first, "end": end, "reason": reason, "order": order}
    append_lines(directory / RECORD_NAME, [row])


def read_skips(directory: Path, order: dict[str, Any]) -> list[list[int]]:
    """The recorded ranges of runs with this order of samples; a line that a crash cut short does not count."""
    path = directory / RECORD_NAME
    if not path.is_file():
        return []
    rows = [row for row in map(_parsed, path.read_text(encoding="utf-8").splitlines()) if row is not None]
    return [[row["first"], row["end"]] for row in rows if row["order"] == order]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
