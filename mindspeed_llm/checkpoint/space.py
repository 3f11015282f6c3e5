"""Whether a volume has room for what is to be written to it, found out before it is written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from mindspeed_llm.errors import UserError

# More than a file system keeps in an inode, so that a block of a quota is really taken.
PROBE_BYTES = 2**16
FP32_BYTES = 4


def bytes_of_parameter(itemsize: int, trained: bool, moment_itemsize: int = FP32_BYTES) -> int:
    """Bytes of one parameter in a checkpoint.

    Args:
        itemsize: of the weight itself.
        trained: with Adam's two moments, and in reduced precision the weight once more, in fp32.
        moment_itemsize: of a moment.
    """
    if not trained:
        return itemsize
    return itemsize + 2 * moment_itemsize + (FP32_BYTES if itemsize < FP32_BYTES else 0)


def free_bytes(path: Path) -> int:
    """Bytes that this user may write on the volume of a path, which need not exist yet."""
    volume = os.statvfs(nearest_existing(path))
    return volume.f_bavail * volume.f_frsize


def nearest_existing(path: Path) -> Path:
    """The path, or the closest directory above it that exists."""
    absolute = path.absolute()
    return next(parent for parent in (absolute, *absolute.parents) if parent.exists())


def space_problem(root: Path, needed: int, what: str) -> str | None:
    """Why `needed` bytes cannot be written below a directory, None when they can.

    Args:
        what: needs them, for the message, e.g. "2 checkpoints".
    """
    free = free_bytes(root)
    if needed <= free:
        return None
    return (
        f"save: {root} has too little room, {in_units(free)}, because {what} need {in_units(needed)}; "
        "try: another --save, a smaller --keep-last, or room there"
    )


def writing_problem(root: Path, flag: str = "--save") -> str | None:
    """Why nothing can be written below a directory, which need not exist; None when it can. Nothing is left there.

    Args:
        flag: names the directory, for the message.
    """
    try:
        there = nearest_existing(root)
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        # Only writing shows it: permissions say nothing of a volume that is read-only, and nothing to root.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as wrong:
        return _not_written(root, wrong, flag)
    return None


def probe(root: Path) -> None:
    """Make a directory and write a small file into it, as a checkpoint will: read-only volumes and quotas fail here.

    Raises:
        UserError: it cannot be done.
    """
    file = root / f".probe_{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("wb") as stream:
                stream.write(b"\0" * PROBE_BYTES)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            file.unlink(missing_ok=True)
    except OSError as wrong:
        raise UserError(_not_written(root, wrong)) from wrong


def _not_written(root: Path, wrong: OSError, flag: str = "--save") -> str:
    reason = "the quota is used up" if wrong.errno == errno.EDQUOT else wrong.strerror
    return f"{flag}: {root} cannot be written to, because of: {reason}; legal: a directory this user may write"


def in_units(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
