"""Telling a device that has no memory left from any other error."""

from __future__ import annotations

import re

import torch

# What the caching allocators of CUDA and torch_npu take from a device for a tensor of 1 to 10 MiB (c10's kLargeBuffer);
# larger tensors take their own size. A smaller rest is of little use.
SEGMENT_BYTES = 20 * 2**20
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# c10's CPU allocator: "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12".
# The caching allocators of CUDA and torch_npu: "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...".
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
REFUSED = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


def refused_bytes(error: BaseException) -> int | None:
    """Bytes that were asked for in vain; 0 where the error does not say how many; None for any other error."""
    text = str(error)
    by_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not by_type and not (isinstance(error, RuntimeError) and REFUSED.search(text)):
        return None
    asked = ASKED.search(text)
    return int(float(asked[1]) * UNITS[asked[2]]) if asked else 0
