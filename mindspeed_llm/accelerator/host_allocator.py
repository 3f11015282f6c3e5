"""Whether glibc keeps the memory of freed tensors for the next ones, or gives it back to the system each time.

glibc maps large blocks one by one and unmaps them when they are freed, so every new tensor of a training step begins
with a page fault for each 4 KiB of it, which costs several times as much as to fill it. Told to keep what was freed,
it takes them from its heap. mallopt(3) changes this for the whole process; figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt in glibc's malloc.h, what keeps freed memory, and what glibc begins with.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
BEGINNING = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
# Who sets these has chosen.
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def why_not() -> str | None:
    """Why this process's allocator cannot be told to keep freed memory; None when it can."""
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return "the C library is not glibc"
    if "malloc" in (preloaded := os.environ.get("LD_PRELOAD", "")):
        return f"LD_PRELOAD={preloaded} brings another allocator"
    return None


def set_by_environment() -> str | None:
    """The variable by which the user has told glibc what to do with freed memory; None when there is none."""
    tunables = ["GLIBC_TUNABLES"] if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") else []
    return next((name for name in (*VARIABLES, *tunables) if name in os.environ), None)


def choose(wanted: str | None) -> None:
    """Let freed memory be kept or not from now on.

    Args:
        wanted: "keep" or "system" (what glibc does by itself); None keeps it where that can be done and the
            environment does not say otherwise.

    Raises:
        RuntimeError: "keep" is wanted, and there is no glibc to be told.
    """
    if wanted == "keep" or (wanted is None and why_not() is None and set_by_environment() is None):
        _set(KEEP)
    elif wanted == "system" and kept():
        _set(BEGINNING)
        ctypes.CDLL(None).malloc_trim(0)


def kept() -> bool:
    """Whether this process was told to keep what it frees."""
    return _in_force == [KEEP]


_in_force: list[dict[int, int]] = []


def _set(values: dict[int, int]) -> None:
    if reason := why_not():
        raise RuntimeError(f"freed memory cannot be kept, because {reason}")
    library = ctypes.CDLL(None)
    if not all(library.mallopt(parameter, value) for parameter, value in values.items()):
        raise RuntimeError("glibc's mallopt refuses what keeps freed memory")
    _in_force[:] = [values]


def describe() -> str:
    """What training on this CPU does with freed memory unless it is told otherwise."""
    if reason := why_not():
        return f"the system's: {reason}"
    if variable := set_by_environment():
        return f"as {variable} says"
    return "freed memory is kept while training"
