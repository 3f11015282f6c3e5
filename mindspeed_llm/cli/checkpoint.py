"""`python -m mindspeed_llm checkpoint`: what a directory of checkpoints holds, whether it is intact, and less of it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mindspeed_llm.checkpoint.directory import health_of, is_complete, iterations, prune
from mindspeed_llm.checkpoint.manifest import changed_file, damage, files_of, has_manifest
from mindspeed_llm.checkpoint.space import in_units
from mindspeed_llm.checkpoint.train_record import read_record, read_tracker
from mindspeed_llm.errors import UserError

# wider than any terminal: a pipe gets one line for each checkpoint too
WIDTH = 160


def list_checkpoints(root: str) -> int:
    """Print a table of the iterations in a directory, the tracker's marked with an arrow."""
    found, tracked = _iterations(root), read_tracker(Path(root))
    table = Table("", "iteration", "state", "healthy", "size", "layout", "saved", box=None, header_style="bold")
    for number, directory in found.items():
        record = _record(directory)
        table.add_row(
            "->" if tracked == str(number) else "",
            str(number),
            _state(directory),
            _health(directory),
            in_units(sum((directory / name).stat().st_size for name in files_of(directory))),
            _layout(record),
            str(record.get("time", "")),
        )
    Console(width=WIDTH).print(table)
    if tracked is not None and tracked.isdigit() and int(tracked) not in found:
        print(f"the tracker names iteration {tracked}, which is not there")
    return 0


def verify_checkpoints(root: str) -> int:
    """Compare every file with the checksum in its manifest; 1 if any differs."""
    damaged = 0
    for directory in _iterations(root).values():
        if not has_manifest(directory):
            print(f"{directory.name}  unknown: no manifest, another program (or an older version) wrote it")
            continue
        why = damage(directory) or changed_file(directory)
        damaged += why is not None
        print(f"{directory.name}  {'intact' if why is None else 'DAMAGED: ' + why}", flush=True)
    return int(damaged > 0)


def prune_checkpoints(root: str, keep_last: int) -> int:
    """Remove all but the newest; see `checkpoint.directory.prune`."""
    if keep_last < 1:
        raise UserError(f"checkpoint: --keep-last {keep_last} is wrong, because one is always kept; legal: 1 or more")
    _iterations(root)
    for directory in prune(root, keep_last):
        print(f"removed {directory}")
    return 0


def _iterations(root: str) -> dict[int, Path]:
    found = iterations(root)
    if not found:
        raise UserError(f"checkpoint: {root} holds no iterations; legal: a directory written by --save")
    return found


def _record(directory: Path) -> dict:
    try:
        return read_record(directory)
    except ValueError:
        return {}


def _state(directory: Path) -> str:
    why = damage(directory)
    if why is not None:
        return f"DAMAGED: {why}"
    return "complete" if is_complete(directory) else "foreign"


def _layout(record: dict) -> str:
    sizes = record.get("layout", {})
    # Training writes tensor_parallel, the converter tensor_parallel_size beside what is no number of ranks.
    split = [f"{name.partition('_parallel')[0]}={n}" for name, n in sizes.items() if "_parallel" in name and n > 1]
    return " ".join(split) or ("one rank" if sizes else "")


def _health(directory: Path) -> str:
    try:
        health = health_of(directory)
    except ValueError:
        health = None
    if health is None:
        return ""
    return "yes" if health["healthy"] else "no: " + ", ".join(health.get("reasons", []))
