"""Command line and YAML to a RunConfig, collecting every problem instead of stopping at the first."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_llm.config.run import RunConfig, all_options, door_options
from mindspeed_llm.config.schema import Option, StepsOrMinutes
from mindspeed_llm.config.upstream import upstream_flags
from mindspeed_llm.errors import UserError

HELP_FLAGS = ("-h", "--help", "--help-all")


@dataclass
class Parsed:
    """What a command line said.

    Attributes:
        problems: one line each; the run must not start while there are any.
        notes: upstream flags that were accepted without effect, with the reason.
    """

    config: RunConfig
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self, more: Sequence[str] = ()) -> None:
        """Raise one UserError that lists all problems, each in a line."""
        problems = [*self.problems, *more]
        if problems:
            raise UserError("\n".join(problems))


def parse(door: str, argv: Sequence[str]) -> Parsed:
    """Read the flags of `door`; values in `--config FILE.yaml` apply where the command line is silent."""
    parsed = Parsed(RunConfig(door))
    flags = {flag: (o, True) for o in door_options(door) for flag in o.flags}
    flags |= {flag: (o, False) for o in door_options(door) for flag in o.off_flags}
    said: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            parsed.problems.append(f"{word!r} does not belong to any flag")
            continue
        flag, equals, inline = word.partition("=")
        values = [inline] if equals else _take_values(words)
        if flag == "--config":
            _read_yaml(parsed, values)
        elif flag in flags:
            o, on = flags[flag]
            _give_back_extra(o, values, words)
            if o.name in said and not o.many:
                parsed.problems.append(f"{flag} is given twice ({said[o.name]} and {flag}); give it once")
            said[o.name] = word
            _set_from_words(parsed, o, flag, on, values)
        elif flag in upstream_flags():
            _note_upstream(parsed, flag)
        else:
            parsed.problems.append(_unknown(flag, flags, door))
    return parsed


def _take_values(words: list[str]) -> list[str]:
    values = []
    while words and not (words[0].startswith("--") and words[0] != "--"):
        values.append(words.pop(0))
    return values


def _give_back_extra(o: Option, values: list[str], words: list[str]) -> None:
    """Words after the last value an option takes belong to nobody; put them back so that they are reported."""
    allowed = len(values) if o.many else (0 if o.scalar is bool else 1)
    if o.scalar is bool and values and values[0].lower() in ("true", "false"):
        allowed = 1
    words[:0] = values[allowed:]
    del values[allowed:]


def _set_from_words(parsed: Parsed, o: Option, flag: str, on: bool, values: list[str]) -> None:
    if o.scalar is bool:
        if values and values[0].lower() == "false":
            on = not on
        parsed.config.set(o.name, on, "command line")
        return
    if not values:
        parsed.problems.append(f"{flag} needs a value: {o.help}")
        return
    try:
        items = [_scalar(o, v) for v in values]
    except ValueError as wrong:
        parsed.problems.append(f"{flag}: {wrong}")
        return
    _accept(parsed, o, items if o.many else items[0], "command line")


def _accept(parsed: Parsed, o: Option, value: Any, source: str) -> None:
    if wrong := o.problem(value):
        parsed.problems.append(wrong)
    else:
        parsed.config.set(o.name, value, source)


def _scalar(o: Option, text: str) -> Any:
    """One value from its text.

    Raises:
        ValueError: the text is not of the option's type.
    """
    if o.scalar is dict:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as wrong:
            raise ValueError(f"{text!r} is not JSON ({wrong})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{text!r} is not a JSON object")
        return value
    if o.scalar is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
    if o.scalar is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
    return o.scalar(text)


def _read_yaml(parsed: Parsed, values: list[str]) -> None:
    if len(values) != 1:
        parsed.problems.append("--config takes one YAML file")
        return
    from mindspeed_llm.config.yaml_file import read_yaml

    known = {o.name: o for o in door_options(parsed.config.door)}
    try:
        entries = read_yaml(values[0])
    except UserError as wrong:
        parsed.problems.append(str(wrong))
        return
    for section, name, value in entries:
        where = f"{values[0]}: {section}.{name}"
        o = known.get(name)
        if o is None or o.section != section:
            near = [f"{k.section}.{k.name}" for k in known.values()]
            parsed.problems.append(f"{where} is not an option of this door{_nearest(f'{section}.{name}', near)}")
        elif parsed.config.given.get(name) == "command line":
            continue
        elif wrong := _wrong_type(o, value):
            parsed.problems.append(f"{where}: {wrong}")
        elif value is not None:
            converted = o.scalar in (float, StepsOrMinutes) and not o.many
            _accept(parsed, o, o.scalar(value) if converted else value, values[0])


def _wrong_type(o: Option, value: Any) -> str | None:
    items = value if o.many else [value]
    if o.many and value is not None and not isinstance(value, list):
        return f"{value!r} is not a list; try: [{value}]"
    legal = {float: (int, float), StepsOrMinutes: (int, str)}.get(o.scalar, (o.scalar,))
    for item in items or []:
        is_bool = isinstance(item, bool)
        if item is not None and (not isinstance(item, legal) or (is_bool and o.scalar is not bool)):
            return f"{item!r} is not of type {o.scalar.__name__}"
    return None


def _note_upstream(parsed: Parsed, flag: str) -> None:
    row = upstream_flags()[flag]
    if row.status == "refused":
        parsed.problems.append(f"{flag} is not supported: {row.reason}")
    else:
        parsed.notes.append(f"{flag} has no effect here: {row.reason}")


def _unknown(flag: str, flags: dict[str, Any], door: str) -> str:
    for o in all_options().values():
        if flag in (*o.flags, *o.off_flags):
            return f"{flag} is no option of {door}; legal with: {', '.join(o.doors)}"
    return f"{flag} is unknown{_nearest(flag, list(flags))}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def parse_or_raise(door: str, argv: Sequence[str], check: Callable[[RunConfig], Sequence[str]] | None = None) -> Parsed:
    """Parse, let `check` add the problems it sees in the values, and raise all of them together."""
    parsed = parse(door, argv)
    parsed.raise_problems(check(parsed.config) if check else ())
    return parsed
