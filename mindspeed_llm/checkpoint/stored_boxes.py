"""Reading a torch_dist checkpoint box by box, straight into the memory where the values belong.

Needs neither megatron nor a process group. A box that this library wrote is told by the bytes before its values
(`box_frame`), and any part of it is read from its place in the file; boxes of other writers go through torch.load.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.box_frame import can_frame, frame
from mindspeed_llm.checkpoint.boxes import Box
from mindspeed_llm.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"
# Threads keep several requests of a disk under way; from the page cache two copy as fast as memory allows.
READERS = 4
_BLOCK_BYTES = 2**26
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_METADATA_GLOBALS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "slice"),
}
Range = tuple[int, int]


class _MetadataUnpickler(pickle.Unpickler):
    """Admits the classes of torch's checkpoint metadata only, so that a checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in _METADATA_MODULES or (module, name) in _METADATA_GLOBALS or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of checkpoint metadata")


class StoredBoxes:
    """What a torch_dist directory holds.

    Args:
        directory: with `.metadata` and *.distcp files.
        trusted: unpickle whatever objects it holds, which runs the code they name.

    Attributes:
        tensors: key -> torch's metadata of a global tensor (size, properties.dtype, chunks).
        objects: keys of what is no tensor.

    Raises:
        UserError: the metadata is damaged.
    """

    def __init__(self, directory: str | Path, trusted: bool = False) -> None:
        self.directory, self.trusted = Path(directory), trusted
        metadata = self._read_metadata()
        self.tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")}
        self.objects = set(metadata.state_dict_metadata) - set(self.tensors)
        self._places: dict[str, dict[tuple[int, ...] | None, Any]] = {}
        for index, info in metadata.storage_data.items():
            offsets = None if index.offset is None else tuple(index.offset)
            self._places.setdefault(index.fqn, {})[offsets] = info
        self._last_read: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None

    def dtype(self, key: str) -> torch.dtype:
        """Of a stored tensor."""
        return self.tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a stored global tensor."""
        return tuple(self.tensors[key].size)

    def read(self, key: str, offsets: Sequence[int], target: Tensor) -> int:
        """Fill a tensor with the values of a part of a stored one, put together from the boxes that overlap it.

        Args:
            offsets: of the part; its shape is the target's, which has as many dimensions as the stored tensor.
            target: of any type and device, not requiring gradients.

        Returns:
            How many of its values were there.

        Raises:
            UserError: a file cannot be read.
        """
        filled = 0
        for chunk in self.tensors[key].chunks:
            overlap = [
                (max(at, start), min(at + size, start + length))
                for at, size, start, length in zip(chunk.offsets, chunk.sizes, offsets, target.shape)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            inside = [(start - at, stop - at) for (start, stop), at in zip(overlap, chunk.offsets)]
            place = tuple(slice(start - at, stop - at) for (start, stop), at in zip(overlap, offsets))
            self._read_chunk(key, chunk, inside, target[place])
            filled += math.prod(stop - start for start, stop in overlap)
        return filled

    def fill(self, boxes: Iterable[Box]) -> None:
        """Fill boxes, all of each; what a flexible one has beyond the stored tensor becomes zeros.

        Raises:
            UserError: tensors are missing, have another shape, or are not all there.
        """
        boxes = list(boxes)
        self._check(boxes)
        with ThreadPoolExecutor(READERS, initializer=_stay_on, initargs=(boxes,)) as readers:
            for box, filled in zip(boxes, readers.map(self._fill_one, boxes)):
                if filled != box.tensor.numel():
                    raise UserError(
                        f"checkpoint: {box.key} in {self.directory} covers {filled} of {box.tensor.numel()} values; "
                        f"it is incomplete"
                    )

    def read_object(self, key: str) -> Any:
        """An object that megatron-core calls sharded, by its unique key.

        Raises:
            UserError: it is missing, damaged, or needs code that is not trusted.
        """
        info = self._places.get(key, {}).get(None)
        if info is None:
            raise UserError(f"checkpoint: {self.directory} does not fit: it holds no {key}")
        (value,) = self._load(self.directory / info.relative_path, info.offset, info.length)
        return value

    def read_common(self) -> dict[str, Any]:
        """The state that is not cut.

        Raises:
            UserError: it is missing, damaged, or needs code that is not trusted.
        """
        return self._load(self.directory / COMMON)

    def _fill_one(self, box: Box) -> int:
        if not box.flexible:
            return self.read(box.key, box.offsets, box.tensor)
        box.tensor.zero_()
        stored = self.shape(box.key)
        beyond = box.tensor.numel() - math.prod(
            max(0, min(at + size, whole) - at) for at, size, whole in zip(box.offsets, box.shape, stored)
        )
        return beyond + self.read(box.key, box.offsets, box.tensor)

    def _check(self, boxes: list[Box]) -> None:
        wrong = []
        for box in boxes:
            if box.key not in self.tensors:
                wrong.append(f"{box.key} is missing")
            elif (found := self.shape(box.key)) != box.global_shape:
                if not box.flexible or found[1:] != box.global_shape[1:]:
                    wrong.append(f"{box.key} has shape {list(found)} instead of {list(box.global_shape)}")
        wrong = list(dict.fromkeys(wrong))
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"checkpoint: {self.directory} does not fit this model: {'; '.join(wrong[:3])}{more}")

    def _read_metadata(self) -> Any:
        path = self.directory / METADATA
        try:
            with path.open("rb") as file:
                return _MetadataUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
            raise UserError(f"checkpoint: {path} cannot be read ({error}); it may be incomplete") from error

    def _read_chunk(self, key: str, chunk: Any, inside: list[Range], target: Tensor) -> None:
        sizes, offsets = tuple(chunk.sizes), tuple(chunk.offsets)
        info = self._places.get(key, {}).get(offsets)
        if info is None or getattr(info, "transform_descriptors", None):
            what = "is not stored" if info is None else "is stored compressed"
            raise UserError(f"checkpoint: {key} at {list(offsets)} {what} in {self.directory}")
        dtype, path = self.dtype(key), self.directory / info.relative_path
        try:
            with path.open("rb", buffering=0) as file:
                start = _start_of_values(file.fileno(), info, dtype, sizes)
                if start is not None:
                    _read_region(file.fileno(), start, dtype, sizes, inside, target)
                    return
        except (OSError, EOFError) as error:
            raise UserError(f"checkpoint: {path} cannot be read ({error}); it may be incomplete") from error
        whole = self._torch_box((key, offsets), path, info)
        target.copy_(whole.reshape(sizes)[tuple(slice(*bounds) for bounds in inside)])

    def _torch_box(self, place: tuple[str, tuple[int, ...]], path: Path, info: Any) -> Tensor:
        """A box of another writer; the last one is kept, since experts are asked for one after another."""
        last = self._last_read
        if last is None or last[0] != place:
            last = self._last_read = (place, self._load(path, info.offset, info.length, tensors_only=True))
        return last[1]

    def _load(self, path: Path, offset: int = 0, length: int | None = None, tensors_only: bool = False) -> Any:
        """What torch.save wrote into (a part of) a file."""
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = io.BytesIO(file.read(-1 if length is None else length))
            return torch.load(content, map_location="cpu", weights_only=tensors_only or not self.trusted)
        except pickle.UnpicklingError as error:
            raise UserError(untrusted(path, error)) from error
        except Exception as error:  # zip, pickle and torch raise a dozen types for damaged files
            raise UserError(f"checkpoint: {path} cannot be read ({error}); it may be incomplete") from error


def _stay_on(boxes: Iterable[Box]) -> None:
    """Let this thread's device be the one that the boxes are on: by itself it would open the first one of the host."""
    index = next((box.tensor.device.index for box in boxes if box.tensor.device.type != "cpu"), None)
    if index is not None:
        accelerator.current().set_device(index)


def untrusted(path: Path, error: BaseException) -> str:
    """The refusal of a file whose pickle asks for more than tensors and plain values."""
    named = re.search(r"(?:GLOBAL|global|class) `?([\w.]+)", str(error))
    what = f"it names {named[1]}" if named else " ".join(str(error).split())[:200]
    return (
        f"checkpoint: {path} is refused, because loading it may run code ({what}); legal: tensors and plain values; "
        "try: --trust-checkpoint if you know who wrote it"
    )


def _start_of_values(file: int, info: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> int | None:
    """Where the values of a box begin in its file, None unless the box is framed as this library does."""
    if not can_frame(dtype, sizes) or (around := frame(dtype, sizes)).length != info.length:
        return None
    is_ours = os.pread(file, len(around.head), info.offset) == around.head
    return info.offset + len(around.head) if is_ours else None


def _read_region(
    file: int, start: int, dtype: torch.dtype, sizes: tuple[int, ...], inside: list[Range], target: Tensor
) -> None:
    """Read a rectangular region of a row-major array in a file, in blocks where it is not one run of bytes."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    first = sum(begin * stride for (begin, _), stride in zip(inside, strides))
    span = 1 + sum((end - begin - 1) * stride for (begin, end), stride in zip(inside, strides))
    at, is_run = start + first * dtype.itemsize, span == target.numel()
    if is_run and target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
        _read_exactly(file, target, at)
        return
    if span * dtype.itemsize > _BLOCK_BYTES and target.numel() > 1:
        axis = next(axis for axis, (begin, end) in enumerate(inside) if end - begin > 1)
        begin, end = inside[axis]
        middle = (begin + end) // 2
        for a, b in ((begin, middle), (middle, end)):
            region = [*inside[:axis], (a, b), *inside[axis + 1 :]]
            _read_region(file, start, dtype, sizes, region, target.narrow(axis, a - begin, b - a))
        return
    block = torch.empty(span, dtype=dtype)
    _read_exactly(file, block, at)
    target.copy_(block.as_strided(target.shape, strides))


def _read_exactly(file: int, target: Tensor, at: int) -> None:
    """Fill a contiguous tensor in host memory from a place in a file."""
    view = memoryview(target.view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], at + done)
        if count == 0:
            raise EOFError(f"it ends {len(view) - done} bytes early")
        done += count
