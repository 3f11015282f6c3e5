"""The places a command line writes to, tried before anything is computed for them."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.checkpoint.space import writing_problem
from mindspeed_llm.config.run import RunConfig, door_options


def unwritable_places(config: RunConfig, without: tuple[str, ...] = ()) -> list[str]:
    """A line for each option that names a place where nothing can be written. Nothing is made there.

    Args:
        without: names of options that this job does not write to.
    """
    problems = []
    for option in door_options(config.door):
        value = config.get(option.name)
        # A default is tried when it is used: not every job does.
        if option.writes is None or option.name in without or value is None or value == option.default:
            continue
        problems.append(_problem(Path(value), option.writes, option.flags[0]))
    return [problem for problem in problems if problem is not None]


def _problem(path: Path, kind: str, flag: str) -> str | None:
    if kind == "directory":
        return writing_problem(path, flag)
    if kind == "file" and path.is_dir():
        return f"{flag}: {path} is wrong, because it is a directory; legal: a file"
    return writing_problem(path.parent, flag)
