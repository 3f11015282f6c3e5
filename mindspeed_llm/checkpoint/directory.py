"""Checkpoint directories: complete or ignored.

A save passes through STAGES. Whatever ends the process at any of them, the checkpoint before stays loadable:

    iter_0000010.tmp   being written; never loaded; removed by the next save
    iter_0000010       complete: written, flushed, listed in its manifest, then renamed
    iter_0000010.old   the former checkpoint of an iteration that is saved again; loaded while iter_0000010 is not there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mindspeed_llm.checkpoint.checksum import FileSum
from mindspeed_llm.checkpoint.manifest import (
    HEALTH_NAME,
    changed_file,
    damage,
    flush_directory,
    flush_tree,
    forget_cached,
    has_manifest,
    write_manifest,
)
from mindspeed_llm.checkpoint.train_record import (
    iteration_directory,
    iteration_of,
    read_record,
    read_tracker,
    write_tracker,
)
from mindspeed_llm.errors import UserError

STAGES = (
    "begun",  # the aside directory is made
    "writing",  # a rank has written some of its bytes (every rank)
    "written",  # a rank's part is on its disk (every rank)
    "indexed",  # what the ranks wrote is merged into one index
    "flushed",  # all files and names are on the disk
    "listed",  # the manifest is written and what it says was checked
    "set_aside",  # the former checkpoint of this iteration, if there is one, is out of the way
    "renamed",  # the directory has its name
    "tracked",  # the tracker names it
    "pruned",  # what is not kept is removed
)

observers: list[Callable[[str], None]] = []
"""Called with the name of each stage that this process passes; fault injection hangs here."""

ASIDE, FORMER = ".tmp", ".old"
_DYING, _GIVEN_UP = ".dying", ".given_up"


def reached(stage: str) -> None:
    """Tell the observers that a save has passed a stage."""
    assert stage in STAGES, stage
    for observer in observers:
        observer(stage)


def begin(root: str | Path, iteration: int, tidy: bool = True) -> Path:
    """Make the directory that a checkpoint is written into, on one process.

    Args:
        tidy: remove what unfinished saves left behind. False while another save of this run may be under way.

    Returns:
        `root/iter_XXXXXXX.tmp`, empty.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    aside = aside_of(root, iteration)
    if tidy:
        _restore_former(root)
    for left in {aside, *(_named(root, ASIDE) if tidy else ())}:
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    reached("begun")
    return aside


def complete(
    aside: Path,
    iteration: int,
    sums: Mapping[str, FileSum] | None = None,
    *,
    read_back: bool = False,
    keep_last: int | None = None,
) -> Path:
    """Make a written directory the checkpoint of its iteration, on one process.

    Args:
        aside: from `begin`, with all files in it.
        sums: of files whose writers have summed what they wrote, by relative name; other files are read.
        read_back: read everything from the disk again and compare.
        keep_last: see `prune`; None keeps all.

    Returns:
        The directory under its final name.

    Raises:
        UserError: what was read back is not what was written.
        OSError: the disk is full or failed; `root` has what it had before.
    """
    root, final = aside.parent, iteration_directory(aside.parent, iteration)
    flush_tree(aside)
    reached("flushed")
    write_manifest(aside, sums)
    _check_written(aside, read_back)
    reached("listed")
    swap_in(aside, final, lambda: reached("set_aside"))
    reached("renamed")
    write_tracker(root, iteration)
    flush_directory(root)
    reached("tracked")
    shutil.rmtree(former_of(final), ignore_errors=True)
    if keep_last is not None:
        prune(root, keep_last)
    reached("pruned")
    return final


def swap_in(aside: Path, final: Path, between: Callable[[], None] = lambda: None) -> None:
    """Give a flushed directory its name; what had the name before is `<name>.old` until the caller removes it."""
    former = former_of(final)
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    between()
    os.replace(aside, final)
    flush_directory(final.parent)


@contextmanager
def discarding(aside: Path) -> Iterator[None]:
    """Remove a half-written directory when the body fails; a failing disk becomes one line.

    Raises:
        UserError: instead of OSError.
    """
    try:
        yield
    except BaseException as wrong:
        _remove_shared(aside)
        if isinstance(wrong, OSError):
            raise UserError(failure_line(aside, wrong)) from wrong
        raise


def _remove_shared(aside: Path) -> None:
    """Remove a directory that other ranks may be about to make files in: under another name none can be made."""
    given_up = aside.with_name(aside.name.removesuffix(ASIDE) + _GIVEN_UP + ASIDE)
    with suppress(OSError):
        shutil.rmtree(given_up, ignore_errors=True)
        os.replace(aside, given_up)
    for path in (given_up, aside):
        shutil.rmtree(path, ignore_errors=True)


def failure_line(aside: Path, wrong: OSError) -> str:
    """What a user needs to know when the disk refuses a checkpoint."""
    before = find_newest(aside.parent)
    intact = f"{before.name} is intact" if before is not None else "there was none before it"
    name, why = aside.name.removesuffix(ASIDE), wrong.strerror or wrong
    return (
        f"save: {name} cannot be written to {aside.parent}, because of {why} ({wrong.filename or 'while writing'}); "
        f"{intact}; try: more room there, or --keep-last"
    )


def is_complete(directory: Path) -> bool:
    """Whether a directory is a checkpoint of ours with all files in their sizes."""
    return has_manifest(directory) and damage(directory) is None


def iterations(root: str | Path) -> dict[int, Path]:
    """Iteration -> its directory, complete or not, ascending by number; leftovers of unfinished saves are not there."""
    root = Path(root)
    found = {n: path for path in _named(root, FORMER) if (n := iteration_of(path.name[: -len(FORMER)])) is not None}
    found |= {n: path for path in root.glob("iter_*") if (n := iteration_of(path.name)) is not None}
    return dict(sorted(found.items()))


def find_newest(
    root: str | Path,
    healthy: bool = False,
    skipped: list[str] | None = None,
    wrong: Callable[[Path], str | None] = damage,
) -> Path | None:
    """The checkpoint to go on from: the tracker's, or, if that is damaged, the newest complete one.

    Older ones than the tracker's come before younger ones, which belong to a course that was given up.

    Args:
        healthy: pass over those that are not marked healthy.
        skipped: gets a line for each that was passed over, with the reason.
        wrong: why a directory is not to be taken, None when it may be.
    """
    root, skipped = Path(root), [] if skipped is None else skipped
    word, found = read_tracker(root), iterations(root)
    if word == "release":
        return root / word
    tracked = int(word) if word is not None and word.isdigit() else None
    if tracked is not None and tracked not in found:
        skipped.append(f"{iteration_directory(root, tracked).name} is not there, though the tracker names it")
    for number in sorted(found, key=lambda n: (tracked is None or n <= tracked, n), reverse=True):
        directory = found[number]
        if not has_manifest(directory) and number != tracked:
            continue
        why = wrong(directory)
        if why is None and healthy and not is_healthy(directory):
            why = "is not marked healthy"
        if why is None:
            return directory
        skipped.append(f"{directory.name}: {why}")
    return None


def prune(root: str | Path, keep_last: int) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints of this run.

    Never removed: the tracker's, the newest complete one, the newest healthy one, damaged ones, and what other
    programs wrote.

    Returns:
        What was removed.
    """
    root = Path(root)
    word = read_tracker(root)
    tracked = int(word) if word is not None and word.isdigit() else None
    ours = [n for n, path in iterations(root).items() if is_complete(path) and path.suffix != FORMER]
    current = [n for n in ours if tracked is None or n <= tracked]
    kept = {tracked, *ours[-1:], *current[len(current) - keep_last :]} if keep_last < len(current) else set(ours)
    kept |= set([n for n in ours if is_healthy(iteration_directory(root, n))][-1:])
    removed = [iteration_directory(root, n) for n in ours if n not in kept]
    for directory in removed:
        leftover = directory.with_name(directory.name + ASIDE)  # what is half removed is never loaded
        os.replace(directory, leftover)
        shutil.rmtree(leftover)
    return removed


def mark_health(directory: Path, healthy: bool, reasons: list[str]) -> None:
    """Write a verdict that comes after the save; it replaces the one in the record."""
    aside = directory / f".{HEALTH_NAME}.tmp"
    aside.write_text(json.dumps({"healthy": healthy, "reasons": reasons}), encoding="utf-8")
    os.replace(aside, directory / HEALTH_NAME)


def health_of(directory: Path) -> dict | None:
    """{"healthy": bool, "reasons": [...]} as the guards saw it; None when no guard has looked."""
    path = directory / HEALTH_NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return read_record(directory).get("health")


def is_healthy(directory: Path) -> bool:
    """Whether the guards marked a checkpoint healthy."""
    return bool((health_of(directory) or {}).get("healthy"))


def _check_written(aside: Path, read_back: bool) -> None:
    """Compare a directory with its manifest: sizes, and on request all bytes as the disk has them."""
    wrong = damage(aside)
    if wrong is None and read_back:
        forget_cached(aside)
        wrong = changed_file(aside)
    if wrong is not None:
        raise UserError(
            f"save: {aside.name.removesuffix(ASIDE)} is not on the disk as it was written, because {wrong}; the "
            "checkpoint before is intact; try: another disk"
        )


def _restore_former(root: Path) -> None:
    """End the exchange of two checkpoints of one iteration that was interrupted."""
    for former in _named(root, FORMER):
        final = former.with_name(former.name[: -len(FORMER)])
        if final.exists() and damage(final) is None:
            shutil.rmtree(former)
        else:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(former, final)


def _named(root: Path, suffix: str) -> list[Path]:
    found = sorted(root.glob(f"iter_*{suffix}"))
    return [p for p in found if iteration_of(p.name.partition(".")[0]) is not None]


def aside_of(root: str | Path, iteration: int) -> Path:
    """The directory that a checkpoint is written into."""
    final = iteration_directory(root, iteration)
    return final.with_name(final.name + ASIDE)


def dying_aside_of(root: str | Path, iteration: int) -> Path:
    """The directory that a checkpoint is written into while training threads may still write the regular one."""
    final = iteration_directory(root, iteration)
    return final.with_name(final.name + _DYING + ASIDE)


def former_of(final: Path) -> Path:
    """What a directory is called while another takes its name."""
    return final.with_name(final.name + FORMER)
