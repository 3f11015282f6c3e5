"""Saving and loading a training state as torch_dist, every rank its own part."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_llm.checkpoint import directory
from mindspeed_llm.checkpoint.boxes import Box
from mindspeed_llm.checkpoint.stored_boxes import StoredBoxes
from mindspeed_llm.checkpoint.train_record import HF_FILES, iteration_directory, write_record
from mindspeed_llm.checkpoint.training_state import TrainingState, merge_facts
from mindspeed_llm.checkpoint.write_part import merge_parts, report_failure, wait_for_parts, write_part
from mindspeed_llm.errors import UserError

# A rank whose part takes longer than this has lost its disk.
PART_TIMEOUT_SECONDS = 3600.0
# Network file systems show a new directory to other hosts after seconds.
SHARED_SECONDS = 60.0


@dataclass
class SaveOrder:
    """What is to be saved where.

    Attributes:
        root: the directory of all iterations.
        iteration: the last finished one.
        record: goes to mindspeed_llm.json; its keys are documented in docs/conversion.md.
        hf_files: directory whose config and tokenizer files are copied into `hf/`; None for none.
        keep_last, read_back: see `directory.complete`.
    """

    root: str | Path
    iteration: int
    record: dict[str, Any]
    hf_files: Path | None = None
    keep_last: int | None = None
    read_back: bool = False

    @property
    def final(self) -> Path:
        """Where it is when it is complete."""
        return iteration_directory(self.root, self.iteration)

    @property
    def aside(self) -> Path:
        """Where it is written before it is complete."""
        return directory.aside_of(self.root, self.iteration)


def save_training(order: SaveOrder, state: TrainingState) -> Path:
    """Write one checkpoint, all ranks together: aside, then renamed, then the tracker moves.

    Returns:
        The directory of the checkpoint.

    Raises:
        UserError: the disk is full or failed, on this rank or, for the first one, on any.
    """
    begin_save(order)
    final = write_and_complete(order, state.own_boxes(), state)
    dist.barrier()
    return final


def begin_save(order: SaveOrder) -> None:
    """The first rank makes the directory, the others wait until it is there."""
    if dist.get_rank() == 0:
        try:
            directory.begin(order.root, order.iteration)
        except OSError as wrong:
            raise UserError(directory.failure_line(order.aside, wrong)) from wrong
    dist.barrier()
    deadline = time.monotonic() + SHARED_SECONDS
    while not order.aside.is_dir():
        if time.monotonic() > deadline:
            raise UserError(
                f"save: {order.aside}, which the first rank made, is not to be seen on {socket.gethostname()}; "
                "legal: a --save that all hosts share"
            )
        time.sleep(0.1)


def write_and_complete(
    order: SaveOrder, boxes: list[Box], state: TrainingState, stop: Callable[[], bool] = lambda: False
) -> Path:
    """Write this rank's part; the first rank waits for all others and completes the checkpoint. Not collective.

    Args:
        boxes: what to write of the state's, in host memory where this runs beside training.
        stop: asked while waiting for the other ranks; True gives up.

    Returns:
        The directory of the checkpoint, which is complete on the first rank alone.
    """
    rank, aside = dist.get_rank(), order.aside
    if rank != 0:
        try:
            write_part(aside, rank, boxes, state.packed_objects(), state.facts)
        except OSError as wrong:
            if not aside.exists():
                raise UserError(f"save: {aside} was given up by the first rank, whose message says why") from wrong
            report_failure(aside, rank, f"{wrong.strerror} ({wrong.filename})")
            raise UserError(directory.failure_line(aside, wrong)) from wrong
        return order.final
    with directory.discarding(aside):
        write_part(aside, rank, boxes, state.packed_objects(), state.facts)
        return index_and_complete(order, range(dist.get_world_size()), state.common, stop)


def index_and_complete(
    order: SaveOrder, ranks: Iterable[int], common: dict[str, Any], stop: Callable[[], bool] = lambda: False
) -> Path:
    """Make a complete checkpoint of the parts of these ranks, as soon as they are there. Not collective."""
    ranks, aside = list(ranks), order.aside
    wait_for_parts(aside, ranks, PART_TIMEOUT_SECONDS, stop)
    sums = merge_parts(aside, ranks, common, merge_facts)
    if order.hf_files is not None:
        copy_hf_files(order.hf_files, aside / HF_FILES)
    write_record(aside, order.record)
    if stop():
        raise UserError(f"save: {aside} was given up, because the run failed meanwhile; a later one is saved instead")
    return directory.complete(aside, order.iteration, sums, read_back=order.read_back, keep_last=order.keep_last)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation files, everything in a model directory that is not weights or code."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(file, target / file.name)


def load_training(source: Path, state: TrainingState, *, trusted: bool = False) -> dict[str, Any]:
    """Read a checkpoint into the live tensors of `state`, at whatever layout it was written; all ranks together.

    Args:
        trusted: unpickle objects of any kind.

    Returns:
        The common state, and what is stored for each of the state's objects under its key.

    Raises:
        UserError: tensors are missing, of other shapes or too many, or a file is damaged or not trusted.
    """
    stored = StoredBoxes(source, trusted)
    _check_none_left(stored, state.boxes)
    stored.fill(state.boxes)
    for accept in state.filled:
        accept()
    return stored.read_common() | {key: stored.read_object(key) for key in state.objects}


def _check_none_left(stored: StoredBoxes, boxes: list[Box]) -> None:
    """Refuse weights in the checkpoint that no rank has a place for (the optimizer's state may be left out)."""
    asked: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(asked, {box.key for box in boxes})
    left = {key for key in stored.tensors if not key.startswith("optimizer.")} - set().union(*asked)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(
            f"checkpoint: {stored.directory} does not fit this model: it holds {', '.join(sorted(left)[:3])}{more}, "
            f"which the model has no place for"
        )
