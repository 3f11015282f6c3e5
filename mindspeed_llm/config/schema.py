"""How one option is declared: a dataclass field whose metadata is all that parser, YAML reader and docs know of it."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LEVELS = ("basic", "advanced", "expert")
KINDS = ("identity", "continuity", "free")
WRITES = (None, "directory", "file", "prefix")
DOORS = ("preprocess", "convert", "pretrain", "posttrain", "inference")
TRAINING_DOORS = ("pretrain", "posttrain")


class StepsOrMinutes(str):
    """`500` (iterations) or `30m` (minutes)."""

    @property
    def iterations(self) -> int | None:
        """The number of iterations, None when minutes are meant."""
        return int(self) if self.isdigit() else None

    @property
    def minutes(self) -> float | None:
        """The number of minutes, None when iterations are meant."""
        return float(self[:-1]) if self.endswith("m") else None

    def problem(self) -> str | None:
        """What is wrong with the text, and what is legal; None when nothing is."""
        number = self.removesuffix("m")
        well_formed = number.isdigit() or (self.endswith("m") and re.fullmatch(r"\d*\.\d+", number))
        if well_formed and float(number) > 0:
            return None
        return "legal: a number of iterations such as 500, or of minutes such as 30m"


def option(
    default: Any = None,
    *,
    help: str,
    level: str = "basic",
    kind: str = "free",
    doors: tuple[str, ...] | None = None,
    choices: tuple[str, ...] | None = None,
    check: Callable[[Any], str | None] | None = None,
    also: tuple[str, ...] = (),
    off: str | None = None,
    metavar: str | None = None,
    writes: str | None = None,
) -> Any:
    """Declare one option of a configuration section.

    Args:
        default: value when neither command line, YAML, checkpoint nor HF config says otherwise.
        level: "basic", "advanced" or "expert": how much of `--help-all` one has to ask for.
        kind: "identity" (must agree with what a checkpoint records), "continuity" (a change on resume is refused) or
            "free".
        doors: the entry points that take it; None means those of its section.
        check: returns what is wrong with a value (and what is legal), or None.
        also: further spellings of the flag, e.g. the older upstream name.
        off: spelling that switches a boolean off when it is not `--no-<name>`.
        writes: what its path is written to as: "directory", "file", or "prefix" of files.
    """
    assert level in LEVELS and kind in KINDS and writes in WRITES, (level, kind, writes)
    metadata = dict(
        help=help,
        level=level,
        kind=kind,
        doors=doors,
        choices=choices,
        check=check,
        also=also,
        off=off,
        metavar=metavar,
        writes=writes,
    )
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> type:
    """A dataclass of options; a boolean without a default is off."""
    for name, hint in cls.__annotations__.items():
        if hint == "bool" and getattr(cls, name).default is None:
            getattr(cls, name).default = False
    return dataclass(cls)


@dataclass(frozen=True)
class Option:
    """One declared option with everything derived from its field.

    Attributes:
        flags: spellings that set it (the first one is shown), e.g. ("--lora-r",).
        off_flags: spellings that set a boolean to False.
        writes: what its path is written to as, if it names one; see `option`.
        scalar: type of one value: bool, int, float, str or dict (a JSON object).
        many: it takes one or more values.
    """

    section: str
    name: str
    default: Any
    scalar: type
    many: bool
    optional: bool
    help: str
    level: str
    kind: str
    doors: tuple[str, ...]
    choices: tuple[str, ...] | None
    check: Callable[[Any], str | None] | None
    flags: tuple[str, ...]
    off_flags: tuple[str, ...]
    metavar: str | None
    writes: str | None

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value` beyond its type, or None."""
        for item in value if self.many and value is not None else [value]:
            if item is None:
                continue
            if self.choices is not None and item not in self.choices:
                return f"{self.flags[0]}: {item!r} is not a choice; legal: {', '.join(self.choices)}"
            if self.check is not None and (wrong := self.check(item)):
                return f"{self.flags[0]}: {item!r} is wrong; {wrong}"
        return None


def at_least(minimum: float) -> Callable[[Any], str | None]:
    """A check that a number is not below `minimum`."""
    return lambda value: None if value >= minimum else f"legal: {minimum} or more"


def above(minimum: float) -> Callable[[Any], str | None]:
    """A check that a number is greater than `minimum`."""
    return lambda value: None if value > minimum else f"legal: more than {minimum}"


def between(low: float, high: float) -> Callable[[Any], str | None]:
    """A check that a number lies in [low, high]."""
    return lambda value: None if low <= value <= high else f"legal: {low} to {high}"


def share(value: float) -> str | None:
    """A check that a number lies in [0, 1)."""
    return None if 0 <= value < 1 else "legal: 0 to below 1"


def options_of(section: str, cls: type, doors: tuple[str, ...]) -> Iterator[Option]:
    """All options that the dataclass `cls` declares, in order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        scalar, many, optional = _value_type(hints[field.name])
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        flag = "--" + field.name.replace("_", "-")
        off = ()
        if scalar is bool:
            off = (meta["off"],) if meta["off"] else ("--no-" + flag[2:],)
        yield Option(
            section=section,
            name=field.name,
            default=default,
            scalar=scalar,
            many=many,
            optional=optional,
            help=meta["help"],
            level=meta["level"],
            kind=meta["kind"],
            doors=meta["doors"] or doors,
            choices=meta["choices"],
            check=meta["check"],
            flags=(flag, *meta["also"]),
            off_flags=off,
            metavar=meta["metavar"],
            writes=meta["writes"],
        )


def _value_type(hint: Any) -> tuple[type, bool, bool]:
    """(type of one value, whether there are many, whether None is allowed) of an annotation like `list[str] | None`."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        optional = True
        assert len(members) == 1, f"an option has one type, not {hint}"
        hint = members[0]
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, optional
    if typing.get_origin(hint) is dict:
        return dict, False, optional
    return hint, False, optional
