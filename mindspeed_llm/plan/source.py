"""What `--load` and `--lora-load` point at: any checkpoint with weights, or adapters alone."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.checkpoint.detect import Found, detect
from mindspeed_llm.checkpoint.train_record import TRACKER_NAME, iteration_directory, read_record
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.peft_settings import CONFIG as PEFT_CONFIG

ADAPTER_FORMATS = ("adapter", "peft")


def find_source(path: str | Path, step: int | None = None) -> Found | None:
    """The checkpoint in a directory, or None when the directory does not exist or holds none.

    Formats are those of `checkpoint.detect.detect`, and "adapter" (a LoRA run's) and "peft".

    Args:
        step: iteration to take instead of the latest.

    Raises:
        UserError: the directory names an iteration that is not there or not complete, or `step` is not there.
    """
    root = Path(path)
    if (root / PEFT_CONFIG).is_file():
        return Found("peft", root, root)
    directory = iteration_directory(root, step) if step is not None else _latest(root)
    if step is not None and not directory.is_dir():
        there = ", ".join(sorted(p.name for p in root.glob("iter_*"))) or "none"
        raise UserError(f"checkpoint: --ckpt-step {step}: {directory} is not there; legal: {there}")
    if directory is not None and directory.is_dir():
        record = read_record(directory)
        if record.get("adapters"):
            return Found("adapter", root, directory, int(record["iteration"]), record)
    if not root.is_dir() or not _may_hold_weights(root):
        return None
    found = detect(root if step is None else directory)
    return Found(found.format, root, found.directory, found.iteration, found.record)


def _latest(root: Path) -> Path | None:
    tracker = root / TRACKER_NAME
    if not tracker.is_file():
        return root if root.name.startswith("iter_") else None
    word = tracker.read_text(encoding="utf-8").strip()
    return iteration_directory(root, int(word)) if word.isdigit() else root / word


def _may_hold_weights(root: Path) -> bool:
    """Whether anything in the directory looks like a checkpoint, so that a broken one is refused and not ignored."""
    marks = (TRACKER_NAME, ".metadata", "config.json")
    return any((root / mark).exists() for mark in marks) or any(root.glob("mp_rank_*"))
