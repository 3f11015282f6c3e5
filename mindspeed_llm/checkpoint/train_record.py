"""What training writes beside the tensors of an iteration, and where an iteration lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD_NAME = "mindspeed_llm.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
HF_FILES = "hf"


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """`root/iter_0000010`."""
    return Path(root) / f"iter_{iteration:07d}"


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a checkpoint directory."""
    (directory / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
