"""The bytes around a tensor in a `.distcp` file: what torch.load needs, known before the tensor is.

torch.distributed.checkpoint reads each box of a tensor with torch.load, so each is a small archive: a pickle with type
and shape, then the values. Here everything but the values follows from type and shape, so that a box is written in one
pass straight from memory, and read straight into memory when the bytes before it are the ones expected. Like
`torch.serialization.set_crc32_options(False)` it leaves the archive's own CRC-32 out; the checksums in the manifest are
of the whole file.
Source: PKWARE APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.16 (its end).
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

# The archive's 32-bit fields hold no more, and smaller boxes are read by several threads.
MAX_BOX_BYTES = 2**30
_ALIGNMENT = 64
_FOLDER = "archive/"
_VALUES = "data/0"
# Date of 1 January 1980: the same bytes for the same state.
_DATE = 0x21
_LOCAL, _CENTRAL, _END = "<IHHHHHIIIHH", "<IHHHHHHIIIHHHHHII", "<IHHHHIIH"
# Extra field that only fills, as torch marks its own: "FB" and its length.
_FILL_ID, _FILL_HEAD = 0x4246, 4


@dataclass(frozen=True)
class Frame:
    """What stands before and after the values of a box."""

    head: bytes
    tail: bytes
    values_bytes: int

    @property
    def length(self) -> int:
        """Bytes of the whole box in the file."""
        return len(self.head) + self.values_bytes + len(self.tail)


def can_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether `frame` knows the type, and the values are not too many."""
    known = torch.storage._dtype_to_storage_type_map()
    return dtype in known and math.prod(shape) * dtype.itemsize <= MAX_BOX_BYTES


@functools.lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """The frame of a contiguous tensor.

    Args:
        shape: of at most `MAX_BOX_BYTES`.
    """
    assert can_frame(dtype, shape), (dtype, shape)
    values_bytes = math.prod(shape) * dtype.itemsize
    records = {"data.pkl": _tensor_pickle(dtype, shape), "byteorder": b"little", "version": b"3\n"}
    head, entries = bytearray(), bytearray()
    for name, content in records.items():
        entries += _entry(name, len(head), len(content))
        head += _header(name, len(content), b"") + content
    start = len(head) + struct.calcsize(_LOCAL) + len(_FOLDER + _VALUES) + _FILL_HEAD
    fill = -start % _ALIGNMENT
    entries += _entry(_VALUES, len(head), values_bytes)
    head += _header(_VALUES, values_bytes, struct.pack("<HH", _FILL_ID, fill) + bytes(fill))
    count = len(records) + 1
    end = struct.pack(_END, 0x06054B50, 0, 0, count, count, len(entries), len(head) + values_bytes, 0)
    return Frame(bytes(head), bytes(entries + end), values_bytes)


def _header(name: str, size: int, extra: bytes) -> bytes:
    path = (_FOLDER + name).encode()
    return struct.pack(_LOCAL, 0x04034B50, 0, 0, 0, 0, _DATE, 0, size, size, len(path), len(extra)) + path + extra


def _entry(name: str, offset: int, size: int) -> bytes:
    path = (_FOLDER + name).encode()
    return struct.pack(_CENTRAL, 0x02014B50, 0, 0, 0, 0, 0, _DATE, 0, size, size, len(path), *(0,) * 5, offset) + path


class _Storage:
    """Stands for the values in the pickle."""


class _Tensor:
    """Pickles as a contiguous tensor over all of its storage."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[Any, tuple]:
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, self.shape, strides, False, OrderedDict())


def _tensor_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    storage = getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype])
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=2)
    pickler.told = ("storage", storage, "0", "cpu", math.prod(shape))
    pickler.dump(_Tensor(tuple(int(size) for size in shape)))
    return file.getvalue()


class _Pickler(pickle.Pickler):
    told: tuple

    def persistent_id(self, obj: Any) -> tuple | None:
        return self.told if isinstance(obj, _Storage) else None
