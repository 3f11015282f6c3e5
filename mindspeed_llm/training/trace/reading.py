"""Trace files of torch's and torch_npu's profilers, as events with times in whole nanoseconds.

torch writes an object whose `traceEvents` are events of Chrome's trace format; torch_npu's
ASCEND_PROFILER_OUTPUT/trace_view.json is the list of events itself, with times as strings. Times are microseconds with
a fraction, and since some count from 1970 a float would lose it: they are read as text.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError

ASCEND_FOLDER, TORCH_TRACE = "ASCEND_PROFILER_OUTPUT", ".pt.trace.json"
ASCEND_TRACE = ASCEND_FOLDER + "/trace_view.json"
PATTERNS = (f"*{TORCH_TRACE}", f"*{TORCH_TRACE}.gz", ASCEND_TRACE)

# A thread of the host, or a stream of a device.
Lane = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Event:
    """Something with a duration; [start, end) in ns."""

    name: str
    category: str
    lane: Lane
    start: int
    end: int
    args: dict[str, Any]


@dataclass
class Trace:
    """What a file holds.

    Attributes:
        rank: as the file or its name says; None where neither does.
        events: sorted by start; of those with the same start the longest first.
        flows: (category, id) -> (lane and time where an arrow begins, and where it ends).
        processes, lanes: names that the profiler gave; a thread may have several.
        left_out: events that have no readable time.
    """

    path: Path
    rank: int | None
    events: list[Event] = field(default_factory=list)
    flows: dict[tuple[str, Any], tuple[tuple[Lane, int], tuple[Lane, int]]] = field(default_factory=dict)
    processes: dict[str, str] = field(default_factory=dict)
    lanes: dict[Lane, set[str]] = field(default_factory=dict)
    left_out: int = 0


def nanoseconds(microseconds: str | int) -> int:
    """Of a decimal number.

    Raises:
        ValueError: it is none.
        OverflowError: it is infinite.
    """
    text = str(microseconds)
    if not re.fullmatch(r"-?\d+(\.\d*)?", text):
        return round(float(text) * 1000)
    whole, _, fraction = text.partition(".")
    value = int(whole.lstrip("-")) * 1000 + int((fraction + "000")[:3])
    return -value if text.startswith("-") else value


def find_traces(places: Sequence[str | Path]) -> list[Path]:
    """The trace files that are named, or lie anywhere in the named directories.

    Raises:
        UserError: a place does not exist, or holds none.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"trace: {place} is wrong, because nothing is there; try: the --profile-save-path of a run")
        files = [place] if place.is_file() else sorted({path for p in PATTERNS for path in place.rglob(p)})
        if not files:
            raise UserError(
                f"trace: {place} is wrong, because it holds no trace; legal: such a file, or a directory with "
                f"{', '.join(PATTERNS)}"
            )
        found += files
    return found


def read_trace(path: str | Path) -> Trace:
    """One file, compressed or not.

    Raises:
        UserError: it is incomplete, or no trace.
    """
    path = Path(path)
    document = _document(path)
    entries = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"trace: {path} is wrong, because it is JSON, but no list of events; legal: what --profile writes, "
            f"{', '.join(PATTERNS)}"
        )
    trace = Trace(path, _rank(path, document))
    starts: dict[tuple[str, Any], tuple[Lane, int]] = {}
    ends: dict[tuple[str, Any], tuple[Lane, int]] = {}
    for entry in entries:
        _take(entry, trace, starts, ends)
    if not trace.events:
        raise UserError(f"trace: {path} is wrong, because no event in it has a duration; try: a trace of --profile")
    trace.events.sort(key=lambda event: (event.start, -event.end))
    trace.flows = {key: (starts[key], ends[key]) for key in starts.keys() & ends.keys()}
    return trace


def _document(path: Path) -> Any:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
        return json.loads(text, parse_float=str)
    except (EOFError, json.JSONDecodeError) as error:
        raise UserError(
            f"trace: {path} is wrong, because it is no whole trace ({error}); try: wait until the profiler has "
            "written it, or trace again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"trace: {path} is wrong, because it is no trace ({error}); legal: what --profile writes, "
            f"{', '.join(PATTERNS)}"
        ) from None


def _rank(path: Path, document: Any) -> int | None:
    """Said by torch in a distributed run; otherwise by the name that --profile gives to the file or folder."""
    if isinstance(document, dict) and "rank" in (document.get("distributedInfo") or {}):
        return int(document["distributedInfo"]["rank"])
    name = path.parent.parent.name if path.parent.name == ASCEND_FOLDER else path.name
    said = re.match(r"rank(\d+)(?=[._]|$)", name)
    return int(said[1]) if said else None


def _take(entry: dict, trace: Trace, starts: dict, ends: dict) -> None:
    """One entry of the file into the trace."""
    phase, lane = entry.get("ph"), (str(entry.get("pid", "")), str(entry.get("tid", "")))
    if phase == "M":
        said = (entry.get("args") or {}).get("name")
        if entry.get("name") == "process_name" and said is not None:
            trace.processes[lane[0]] = str(said)
        elif entry.get("name") == "thread_name" and said is not None:
            trace.lanes.setdefault(lane, set()).add(str(said))
        return
    if phase not in ("X", "s", "f"):
        return
    try:
        start = nanoseconds(entry["ts"])
        end = start + nanoseconds(entry["dur"]) if phase == "X" else start
        if end < start:
            raise ValueError(f"a duration below 0: {entry['dur']}")
    except (KeyError, ValueError, OverflowError):
        trace.left_out += 1
        return
    if phase == "X":
        name, category = str(entry.get("name", "")), str(entry.get("cat", ""))
        trace.events.append(Event(name, category, lane, start, end, entry.get("args") or {}))
    else:
        (starts if phase == "s" else ends)[str(entry.get("cat", "")), str(entry.get("id"))] = lane, start
