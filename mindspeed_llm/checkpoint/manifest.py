"""The manifest of a checkpoint: every file with size and checksum, written last, so that a half checkpoint shows.

<directory>/manifest.json    {"version": 1, "algorithm": "xxh3_64", "files": {"common.pt": [size, "checksum"], ...}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mindspeed_llm.checkpoint.checksum import ALGORITHM, FileSum, file_sum
from mindspeed_llm.checkpoint.train_record import RECORD_NAME, read_record

MANIFEST_NAME = "manifest.json"
HEALTH_NAME = "health.json"
VERSION = 1

# A verdict that comes after the save may be written beside the files of the manifest.
_OUTSIDE = {MANIFEST_NAME, HEALTH_NAME}


def flush_file(path: Path) -> None:
    """Wait until a file is on its disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on its disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Wait until everything in a directory is on its disk, names last."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            flush_file(Path(parent) / name)
        flush_directory(Path(parent))


def write_manifest(directory: Path, known: Mapping[str, FileSum] | None = None) -> dict[str, FileSum]:
    """List all files of a directory in its manifest, on disk when this returns.

    Args:
        known: relative names whose writers have summed what they wrote; the other files are read.
    """
    known = known or {}
    sums = {name: known.get(name) or file_sum(directory / name) for name in files_of(directory)}
    content = {
        "version": VERSION,
        "algorithm": ALGORITHM,
        "files": {name: [entry.size, entry.checksum] for name, entry in sums.items()},
    }
    path = directory / MANIFEST_NAME
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    flush_directory(directory)
    return sums


def files_of(directory: Path) -> list[str]:
    """Relative names of the files that belong into the manifest of a directory."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in _OUTSIDE)


def has_manifest(directory: Path) -> bool:
    """Whether the manifest is there, or the record says that it should be."""
    try:
        promised = bool(read_record(directory).get("manifest"))
    except (OSError, ValueError):
        promised = True  # a damaged record of ours
    return promised or (directory / MANIFEST_NAME).is_file()


def read_manifest(directory: Path) -> dict[str, FileSum]:
    """Relative name -> what the file must be like.

    Raises:
        ValueError: the manifest is missing or damaged; the message says which, without the directory.
    """
    try:
        content = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        if (content["version"], content["algorithm"]) != (VERSION, ALGORITHM):
            raise ValueError(f"{MANIFEST_NAME} is of version {content['version']}, {content['algorithm']}")
        return {name: FileSum(int(size), str(checksum)) for name, (size, checksum) in content["files"].items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_NAME} is missing") from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as wrong:
        raise ValueError(f"{MANIFEST_NAME} is damaged ({wrong!r})") from wrong


def damage(directory: Path) -> str | None:
    """What is wrong with a directory by the names and sizes of its files; None for a complete or a foreign one.

    Foreign checkpoints (Megatron's, and ours from before there were manifests) have nothing to be compared with.
    """
    if not directory.is_dir():
        return "is not there"
    if not has_manifest(directory):
        return None
    try:
        manifest = read_manifest(directory)
    except ValueError as wrong:
        return str(wrong)
    if RECORD_NAME not in manifest:
        return f"{MANIFEST_NAME} is damaged (it does not list {RECORD_NAME})"
    for name, expected in manifest.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
    return None


def changed_file(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a directory by the checksums of its files; None when they are as they were written.

    Args:
        names: look at these files alone (ranks share the work); None means all.
    """
    manifest = read_manifest(directory)
    for name in manifest if names is None else names:
        try:
            found = file_sum(directory / name)
        except OSError as wrong:
            return f"{name} cannot be read ({wrong.strerror})"
        if found != manifest[name]:
            return f"{name} was changed after it was written (its checksum is another)"
    return None


def forget_cached(directory: Path) -> None:
    """Drop a directory's files from the page cache, so that what is read next comes from the disk."""
    for name in files_of(directory):
        with (directory / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
