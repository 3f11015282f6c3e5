"""Chains of elementwise kernels over a few rows at a time: on a CPU, what one writes the next finds in the cache.

Over a whole activation every kernel of a chain would read and write memory, and its result would be memory that the
system hands out page by page. Other devices, whose cost is the launch, take all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a block in the type it is computed in, per thread: what a core's second cache holds beside two others.
BLOCK_BYTES = 2**19


def row_blocks(rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers, computed in `dtype` (like's unless given) on like's device."""
    step = max(1, rows)
    if like.device.type == "cpu":
        row_bytes = max(1, width) * (dtype or like.dtype).itemsize
        step = max(1, BLOCK_BYTES * torch.get_num_threads() // row_bytes)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def scratch(blocks: list[slice], width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for the largest of the blocks, [rows, width]."""
    rows = max((block.stop - block.start for block in blocks), default=0)
    return like.new_empty(rows, width, dtype=dtype or like.dtype)
