"""Whether glibc keeps the memory of freed tensors for the next ones, or gives it back to the system each time.

glibc maps large blocks one by one and unmaps them when they are freed, so every new tensor of a training step begins
with a page fault for each 4 KiB of it, which costs several times as much as to fill it. Told to keep what was freed,
it takes them from its heap. mallopt(3) changes this for the whole process; figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt in glibc's malloc.h, and what keeps freed memory: nothing is mapped by itself, nothing trimmed.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}

_kept = False


def why_not() -> str | None:
    """Why this process's allocator cannot be told to keep freed memory; None when it can."""
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return "the C library is not glibc"
    if "malloc" in (preloaded := os.environ.get("LD_PRELOAD", "")):
        return f"LD_PRELOAD={preloaded} brings another allocator"
    return None


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees from now on, until it ends.

    Raises:
        RuntimeError: there is no glibc to be told, or it refuses.
    """
    global _kept
    if reason := why_not():
        raise RuntimeError(f"freed memory cannot be kept, because {reason}")
    library = ctypes.CDLL(None)
    if not all(library.mallopt(parameter, value) for parameter, value in KEEP.items()):
        raise RuntimeError("glibc's mallopt refuses what keeps freed memory")
    _kept = True


def kept() -> bool:
    """Whether this process was told to keep what it frees."""
    return _kept


def describe() -> str:
    """Whether --cpu-allocator keep can be had."""
    reason = why_not()
    return (
        f"--cpu-allocator keep cannot be had: {reason}" if reason else "freed memory is kept with --cpu-allocator keep"
    )
