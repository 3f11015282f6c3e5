"""What a path holds, and the tensor source for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.directory import FORMER, find_newest, is_complete, iterations
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.manifest import damage, has_manifest
from mindspeed_llm.checkpoint.megatron import MegatronSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.checkpoint.stored_boxes import METADATA
from mindspeed_llm.checkpoint.torch_dist import TorchDistSource
from mindspeed_llm.checkpoint.train_record import (
    HF_FILES,
    TRACKER_NAME,
    iteration_directory,
    iteration_of,
    read_record,
    read_tracker,
)
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
        skipped: a line for each newer checkpoint that was passed over, with the reason.
    """

    format: str
    path: Path
    directory: Path
    iteration: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

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
    directory, _ = choose_iteration(root)
    if directory is not None:
        return detect_iteration(root, directory)
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


def choose_iteration(
    root: Path, step: int | None = None, *, fall_back: bool = False, healthy: bool = False
) -> tuple[Path | None, list[str]]:
    """(directory of the iteration to load or None for no Megatron checkpoint, what was passed over and why).

    Args:
        root: directory with iterations, or one of them.
        step: this iteration and no other.
        fall_back: where the tracker's is damaged or missing, take the newest complete one.
        healthy: with `fall_back`, pass over what is not marked healthy.

    Raises:
        UserError: the iteration asked for is not there or not complete, or none is.
    """
    word, known = read_tracker(root), iterations(root)
    if step is not None:
        if step not in known:
            there = ", ".join(path.name for path in known.values()) or "none"
            missing = iteration_directory(root, step)
            raise UserError(f"checkpoint: --ckpt-step {step}: {missing} is not there; legal: {there}")
        return refuse_damaged(known[step]), []
    if word is not None and word != "release" and not word.isdigit():
        if not fall_back:
            raise UserError(f"checkpoint: {root / TRACKER_NAME} holds {word!r}; legal: an iteration number, or release")
        word = None
    if word is None and not (fall_back and any(map(has_manifest, known.values()))):
        is_iteration = iteration_of(root.name.removesuffix(FORMER)) is not None or (root / METADATA).is_file()
        return (refuse_damaged(root) if is_iteration or any(root.glob("mp_rank_*")) else None), []
    if fall_back:
        skipped: list[str] = []
        found = find_newest(root, healthy, skipped)
        if found is None:
            raise UserError(f"checkpoint: nothing loadable in {root} ({'; '.join(skipped)}); try: another --load")
        return found, skipped
    directory = root / word if word == "release" else known.get(int(word), iteration_directory(root, int(word)))
    return refuse_damaged(directory, f"{TRACKER_NAME} -> {word}, but "), []


def refuse_damaged(directory: Path, why: str = "") -> Path:
    """The directory, if all files of its manifest are there in their sizes, or there never was one.

    Raises:
        UserError: they are not; names the file, and what could be loaded instead.
    """
    root = directory.parent
    if not directory.is_dir():
        raise UserError(
            f"checkpoint: nothing loadable in {root} (found: {why}no {directory.name}/); try: --ckpt-step of one "
            "that is there, or copy it again"
        )
    wrong = damage(directory)
    if wrong is None:
        return directory
    others = ", ".join(path.name for path in iterations(root).values() if is_complete(path)) or "none"
    raise UserError(f"checkpoint: {directory} is damaged, because {wrong}; complete: {others}; try: --ckpt-step N")


def detect_iteration(root: Path, directory: Path, skipped: Sequence[str] = (), adapters: bool = False) -> Found:
    """What lies in the directory of one iteration.

    Args:
        adapters: take those of a LoRA run, as format "adapter".

    Raises:
        UserError: nothing loadable, or adapters.
    """
    number = iteration_of(directory.name.removesuffix(FORMER)) or 0
    try:
        record = read_record(directory)
    except ValueError as error:
        raise UserError(f"checkpoint: the record in {directory} is damaged ({error})") from error
    if record.get("adapters") and not adapters:
        raise UserError(
            f"checkpoint: {directory} holds LoRA adapters only; try: name the base model, and --lora-load for these"
        )
    if record.get("adapters"):
        return Found("adapter", root, directory, number, record, tuple(skipped))
    if (directory / METADATA).is_file():
        return Found("torch_dist", root, directory, number, record, tuple(skipped))
    if any(directory.glob("mp_rank_*")):
        return Found("megatron", root, directory, number, record, tuple(skipped))
    raise UserError(
        f"checkpoint: nothing loadable in {root} (found: {directory.name}/ with {_listing(directory)}); legal: "
        f"mp_rank_00/, mp_rank_00_000/, or torch_dist files"
    )


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
