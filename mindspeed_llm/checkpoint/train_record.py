"""What training writes beside the tensors of an iteration, and where an iteration lies."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

RECORD_NAME = "mindspeed_llm.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
HF_FILES = "hf"

_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """`root/iter_0000010`."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """10 for `iter_0000010`; None for other names."""
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a checkpoint directory; it promises the manifest that `directory.complete` writes."""
    text = json.dumps(record | {"manifest": True}, indent=1)
    (directory / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint directory, empty for foreign checkpoints."""
    path = directory / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_tracker(root: Path, iteration: int) -> None:
    """Point the tracker at `iteration`, in one step: a reader sees the old or the new number."""
    temporary = root / f".{TRACKER_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / TRACKER_NAME)


def read_tracker(root: Path) -> str | None:
    """The tracker's word: a number or "release"; None when there is no tracker."""
    path = root / TRACKER_NAME
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
