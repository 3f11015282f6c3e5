"""What every door does the same way: help, problems in one place, exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from mindspeed_llm.config.help import help_text
from mindspeed_llm.config.parser import HELP_FLAGS, Parsed, parse
from mindspeed_llm.errors import UserError

SECONDS_FOR_FIRST_RANK = 2.0


def open_door(door: str, what: str, argv: Sequence[str] | None, action: Callable[[Parsed], int | None]) -> int:
    """Parse `argv` (default: the process's) and run `action` on it.

    Args:
        what: one sentence for `--help`.
        action: gets the parsed command line, whose problems it must raise; its result is the exit status (None: 0).

    Returns:
        0, or 1 after a UserError, which is printed to stderr a line per problem.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in HELP_FLAGS for word in words):
        print(help_text(door, what, everything="--help-all" in words))
        return 0
    parsed = parse(door, words)
    if parsed.config.runtime.device != "auto":
        # Before anything asks for the current accelerator.
        os.environ["MINDSPEED_LLM_DEVICE"] = parsed.config.runtime.device
    try:
        status = action(parsed)
    except UserError as wrong:
        report_error(wrong)
        return 1
    return status or 0


def report_error(wrong: UserError) -> None:
    """Print the problems to stderr.

    Usually all processes see the same ones: the first prints at once and the launcher then ends the others while they
    wait here; a process that alone has a problem says so, with its rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    prefix = "error: " if rank == 0 else f"error on rank {rank}: "
    if rank != 0:
        time.sleep(SECONDS_FOR_FIRST_RANK)
    print("\n".join(prefix + line for line in str(wrong).split("\n")), file=sys.stderr, flush=True)


def say_notes(notes: Sequence[str]) -> None:
    """Print what was accepted without effect, on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            print(f"note: {note}")
