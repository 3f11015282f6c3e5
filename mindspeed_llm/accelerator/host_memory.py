"""How much memory the host can still give this process: what the system has, and what its control group may have."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

# Of control groups, version 2 and 1: where they are mounted, how a line of /proc/self/cgroup says which one it is, and
# the files of the limit, of what is taken, and of its details.
_VERSIONS = (
    ("sys/fs/cgroup", r"^0::/(.*)$", "memory.max", "memory.current", "memory.stat"),
    (
        "sys/fs/cgroup/memory",
        r"^\d+:(?:\w+,)*memory(?:,\w+)*:/(.*)$",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.stat",
    ),
)


def host_room(root: Path = Path("/")) -> int:
    """Bytes for one process; processes of a host that torchrun started share alike.

    Args:
        root: where proc and sys are mounted.
    """
    available = re.search(r"MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text())
    rooms = [int(available[1]) * 1024, *_group_rooms(root)]
    return max(min(rooms), 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def address_room() -> int | None:
    """Bytes that may still be mapped, resident or not; None without a limit (RLIMIT_AS)."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_bytes() -> int:
    """Bytes of memory that this process has pages for."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _group_rooms(root: Path) -> list[int]:
    """What is left of the limits of this process's control group and of those above it."""
    groups, rooms = _text(root / "proc/self/cgroup"), []
    for mounted, line, limit, taken, details in _VERSIONS:
        top, group = root / mounted, re.search(line, groups, re.MULTILINE)
        own = top / group[1] if group else top
        for place in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            most, used = _text(place / limit).strip(), _text(place / taken).strip()
            if most.isdigit() and used.isdigit():
                # Files that nobody uses are dropped before a process is refused.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(place / details), re.MULTILINE)
                rooms.append(int(most) - int(used) + (int(cached[1]) if cached else 0))
    return rooms


def _text(path: Path) -> str:
    """A file's text, "" where there is none for us."""
    try:
        return path.read_text()
    except OSError:
        return ""
