"""The checksum of checkpoint files: XXH3, 64 bits, which notices damage at the speed of memory.

Measured on the 2-core development machine: XXH3 16.6 GB/s, CRC-32 4.0, BLAKE2b 0.6; a file is written at 1.4 GB/s.
It protects from disks and networks, not from somebody who forges a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

ALGORITHM = "xxh3_64"
# Stays in a core's cache between summing and writing.
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileSum:
    """What a file must be like.

    Attributes:
        size: in bytes.
        checksum: XXH3-64 of all of them, in hexadecimal.
    """

    size: int
    checksum: str


def new_checksum() -> Any:
    """An object with `update(bytes-like)` and `hexdigest()`."""
    return xxhash.xxh3_64()


def file_sum(path: Path) -> FileSum:
    """Size and checksum of a file, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    checksum, size = new_checksum(), 0
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(view[:count])
            size += count
    return FileSum(size, checksum.hexdigest())
