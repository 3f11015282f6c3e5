"""What a path holds, and the tensor source for it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.megatron import MegatronSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.checkpoint.torch_dist import METADATA, TorchDistSource
from mindspeed_llm.checkpoint.train_record import HF_FILES, TRACKER_NAME, iteration_directory, read_record
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.shape import ModelShape


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk.

    Attributes:
        format: "hf", "megatron" (mp_rank files) or "torch_dist".
        path: the directory that was named.
        directory: the directory that holds the weights.
        iteration: number in the name of an iteration directory; 0 for HF and `release`.
        record: what this library wrote beside the weights; empty for foreign checkpoints.
    """

    format: str
    path: Path
    directory: Path
    iteration: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def hf_files(self) -> Path | None:
        """The directory with config.json and tokenizer that belongs to the checkpoint, if there is one."""
        for directory in (self.directory, self.directory / HF_FILES):
            if (directory / "config.json").is_file():
                return directory
        return None


def detect(path: str | Path) -> Found:
    """Find out what a directory holds.

    Args:
        path: HF model directory, Megatron checkpoint directory (with the tracker file), or one of its iterations.

    Raises:
        UserError: nothing loadable; the message says what was found.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"checkpoint: {root} is not a directory; legal: a Hugging Face or Megatron checkpoint directory"
        )
    tracker = root / TRACKER_NAME
    if tracker.is_file():
        return _detect_iteration(root, _tracked(tracker), f"{TRACKER_NAME} -> {tracker.read_text().strip()}")
    if (root / METADATA).is_file() or any(root.glob("mp_rank_*")):
        return _detect_iteration(root, root, "")
    weights = [*root.glob("*.safetensors"), *root.glob("pytorch_model*.bin")]
    if (root / "config.json").is_file() and weights:
        return Found("hf", root, root)
    raise UserError(
        f"checkpoint: nothing loadable in {root} (found: {_listing(root)}); legal: config.json with *.safetensors or "
        f"pytorch_model*.bin, or {TRACKER_NAME} with an iteration of mp_rank_* or torch_dist files"
    )


def open_source(
    path: str | Path | Found, shape: ModelShape | None = None, ignore_fields: Collection[str] = ()
) -> TensorSource:
    """The tensors of a checkpoint of any format.

    Args:
        path: a directory, or what `detect` found there.
        shape: of the model, where the caller knows it; else our record's, else from the checkpoint's config.json.
        ignore_fields: fields of config.json to disregard (`--ignore-config-field`).

    Raises:
        UserError: nothing loadable, no shape to be had, or the tensors are not this model's.
    """
    found = path if isinstance(path, Found) else detect(path)
    shape = shape or shape_of(found, ignore_fields)
    if found.format == "hf":
        return HfSource(found.directory, shape)
    return {"megatron": MegatronSource, "torch_dist": TorchDistSource}[found.format](found.directory, shape)


def shape_of(found: Found, ignore_fields: Collection[str] = ()) -> ModelShape:
    """The architecture that a checkpoint records.

    Raises:
        UserError: it records none.
    """
    if found.record.get("shape"):
        return ModelShape.from_json(found.record["shape"])
    if found.hf_files is not None:
        return shape_from_hf(read_hf_config(found.hf_files), ignore_fields)
    raise UserError(
        f"checkpoint: {found.directory} records no architecture, because another program wrote it; try: --hf-cfg-dir "
        f"DIR with the model's config.json"
    )


def _tracked(tracker: Path) -> Path:
    word = tracker.read_text(encoding="utf-8").strip()
    if word == "release":
        return tracker.parent / "release"
    if not word.isdigit():
        raise UserError(f"checkpoint: {tracker} holds {word!r}; legal: an iteration number, or release")
    return iteration_directory(tracker.parent, int(word))


def _detect_iteration(root: Path, directory: Path, why: str) -> Found:
    found_text = f"{why}, but " if why else ""
    if not directory.is_dir():
        raise UserError(f"checkpoint: nothing loadable in {root} (found: {found_text}no {directory.name}/)")
    digits = directory.name.removeprefix("iter_")
    iteration = int(digits) if digits.isdigit() else 0
    try:
        record = read_record(directory)
    except json.JSONDecodeError as error:
        raise UserError(f"checkpoint: the record in {directory} is damaged ({error})") from error
    if (directory / METADATA).is_file():
        if record.get("adapters"):
            raise UserError(
                f"checkpoint: {directory} holds LoRA adapters only; try: name the base model, and --lora-load for these"
            )
        return Found("torch_dist", root, directory, iteration, record)
    if any(directory.glob("mp_rank_*")):
        return Found("megatron", root, directory, iteration, record)
    raise UserError(
        f"checkpoint: nothing loadable in {directory} (found: {found_text}{_listing(directory)}); legal: mp_rank_00/, "
        f"mp_rank_00_000/, or torch_dist files"
    )


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
