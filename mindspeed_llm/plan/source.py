"""What `--load` points at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.train_record import TRACKER_NAME, iteration_directory, read_record
from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class LoadSource:
    """A checkpoint that was found.

    Attributes:
        kind: "hf" (a Hugging Face directory), "megatron" (mp_rank files), "torch_dist" (what training saves, or
            megatron-core's own), "adapter" (adapters alone, ours) or "peft".
        path: the directory that was named.
        directory: the directory with the tensors (for Megatron formats the iter_XXXXXXX one).
        record: what this library wrote beside the tensors; empty for foreign checkpoints.
    """

    kind: str
    path: Path
    directory: Path
    iteration: int = 0
    record: dict[str, Any] = field(default_factory=dict)


def find_source(path: str | Path, step: int | None = None, flag: str = "--load") -> LoadSource | None:
    """What the directory holds, or None when it holds no checkpoint (or does not exist).

    Args:
        step: iteration to take instead of the latest.

    Raises:
        UserError: the directory names an iteration that is not there, or `step` does not exist.
    """
    root = Path(path)
    if (root / "adapter_config.json").is_file():
        return LoadSource("peft", root, root)
    if (root / "config.json").is_file() and step is None and not (root / TRACKER_NAME).is_file():
        return LoadSource("hf", root, root)
    if root.name.startswith("iter_") and root.is_dir():
        return _from_iteration(root, root)
    tracker = root / TRACKER_NAME
    if step is None and not tracker.is_file():
        return None
    word = str(step) if step is not None else tracker.read_text(encoding="utf-8").strip()
    directory = root / "release" if word == "release" else iteration_directory(root, int(word))
    if not directory.is_dir():
        there = ", ".join(sorted(p.name for p in root.glob("iter_*"))) or "none"
        raise UserError(f"checkpoint: {flag} {root}: {directory.name} is not there; found: {there}; try: --ckpt-step N")
    return _from_iteration(root, directory)


def _from_iteration(root: Path, directory: Path) -> LoadSource:
    record = read_record(directory)
    if (directory / ".metadata").is_file():
        kind = "adapter" if record.get("adapters") else "torch_dist"
    elif any(directory.glob("mp_rank_*")):
        kind = "megatron"
    else:
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "nothing"
        raise UserError(f"checkpoint: nothing loadable in {directory} (found: {found}); it may be incomplete")
    return LoadSource(kind, root, directory, int(record.get("iteration", 0)), record)
