"""What `--load` and `--lora-load` point at: any checkpoint with weights, or adapters alone."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.checkpoint.detect import Found, choose_iteration, detect, detect_iteration
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.peft_settings import CONFIG as PEFT_CONFIG

ADAPTER_FORMATS = ("adapter", "peft")


def find_adapters(path: str | Path, *, fall_back: bool = False, healthy: bool = False) -> Found:
    """The adapters in a directory; arguments as of `find_source`.

    Raises:
        UserError: it holds none.
    """
    source = find_source(path, fall_back=fall_back, healthy=healthy)
    if source is None or source.format not in ADAPTER_FORMATS:
        raise UserError(
            f"lora: --lora-load {path} holds no adapters of ours or of PEFT; legal: a --save directory of a LoRA run, "
            "or one with adapter_config.json"
        )
    return source


def find_source(
    path: str | Path, step: int | None = None, *, fall_back: bool = False, healthy: bool = False
) -> Found | None:
    """The checkpoint in a directory, or None when the directory does not exist or holds none.

    Formats are those of `checkpoint.detect.detect`, and "adapter" (a LoRA run's) and "peft".

    Args:
        step, fall_back, healthy: see `checkpoint.detect.choose_iteration`.

    Raises:
        UserError: the directory names an iteration that is not there or not complete, or `step` is not there.
    """
    root = Path(path)
    if (root / PEFT_CONFIG).is_file():
        return Found("peft", root, root)
    if step is None and not root.is_dir():
        return None
    directory, skipped = choose_iteration(root, step, fall_back=fall_back, healthy=healthy)
    if directory is not None:
        return detect_iteration(root, directory, skipped, adapters=True)
    return detect(root) if (root / "config.json").exists() else None
