"""Where a process stands: whether it waits for other ranks, and the stacks of all its threads."""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
from types import FrameType


def whereabouts(thread: int) -> tuple[bool, str]:
    """(whether the process waits in a collective, "file:line function" of the innermost frame of `thread`)."""
    frames = sys._current_frames()
    own = threading.get_ident()
    waits = any(_waits(frame) for number, frame in frames.items() if number != own)
    frame = frames.get(thread)
    if frame is None:
        return waits, "its end"
    return waits, f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.endswith("torch/distributed/distributed_c10d.py"):
        return True
    in_training = "/megatron/" in file or "/mindspeed_llm/" in file
    return in_training and ".wait(" in linecache.getline(file, frame.f_lineno)


def all_stacks() -> str:
    """The stacks of all threads of this process but the one that asks, the innermost frame last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    return "\n".join(
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for number, frame in sys._current_frames().items()
        if number != own
    )


def late_line(known: dict[int, str | None], seconds: float) -> str:
    """The line about ranks that others wait for.

    Args:
        known: by rank "waits|host|place", "works|host|place", or None for a rank that did not answer.
    """
    late = []
    for rank, word in known.items():
        if word is None:
            late.append(f"rank {rank} does not answer")
            continue
        state, host, place = word.split("|", 2)
        if state == "works":
            late.append(f"rank {rank} on {host} is at {place}")
    waiting = sum(word is not None and word.startswith("waits") for word in known.values())
    who = "; ".join(late[:8]) or "nobody: all ranks wait, so their collectives do not match"
    return f"no step was finished for {seconds:.0f} s; {waiting} of {len(known)} ranks wait for {who}"
