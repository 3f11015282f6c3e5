"""What a patch declares, and how the source it was written against is recognised."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class Patch:
    """One change to one symbol of another package.

    Exactly one of `replace` and `wrap` is given.

    Args:
        name: how people refer to it; unique in a catalogue.
        target: `package.module:Symbol` or `package.module:Class.method`.
        why: one sentence, what goes wrong without it.
        replace: the new object.
        wrap: called with the original, returns the new object.
        condition: decides from the final configuration whether to apply; None applies always.
        fingerprints: package version -> `fingerprint` of the target's source the patch was written against. A version
            that is not listed is accepted when its source equals a listed one.
        versions: of the package that have the target, as a specifier (">=0.16"); in others there is nothing to change.
        needs: a package that is not part of every installation, which holds the target's module or is imported by it;
            where that package is absent there is nothing to change. A module that is absent beside it is missing.
    """

    name: str
    target: str
    why: str
    replace: Any = None
    wrap: Callable[[Any], Any] | None = None
    condition: Callable[[Any], bool] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        if (self.replace is None) == (self.wrap is None):
            raise ValueError(f"patch {self.name}: give exactly one of replace and wrap")
        if self.target.count(":") != 1:
            raise ValueError(f"patch {self.name}: target {self.target!r} must read package.module:Symbol[.attribute]")
        if not self.fingerprints:
            raise ValueError(f"patch {self.name}: it names no fingerprint, so a changed target would go unnoticed")

    def concerns(self, version: str) -> bool:
        """Whether that version of the package has the target."""
        return not self.versions or SpecifierSet(self.versions, prereleases=True).contains(version)

    def is_installed(self) -> bool:
        """Whether what the target needs is there. A module that went by another name is not excused by that."""
        if not self.needs:
            return True
        try:
            importlib.import_module(self.module_name)
        except ModuleNotFoundError as error:
            return error.name != self.needs
        return True

    @property
    def module_name(self) -> str:
        """The dotted name of the module that holds the target."""
        return self.target.split(":")[0]

    @property
    def path(self) -> list[str]:
        """The attributes from the module to the target."""
        return self.target.split(":")[1].split(".")


@dataclass(frozen=True)
class Location:
    """A resolved target: `vars(owner)[name]` is `value` as stored (a staticmethod stays one)."""

    owner: Any
    name: str
    value: Any


def locate(patch: Patch) -> Location:
    """Import the module of a patch and find its target.

    Raises:
        UserError: the module or the symbol does not exist.
    """
    try:
        owner: Any = importlib.import_module(patch.module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"patch {patch.name}: {patch.target} is missing, because {error}; try: another version"
        ) from None
    *parents, name = patch.path
    for parent in parents:
        owner = getattr(owner, parent, None)
    if owner is None or name not in vars(owner):
        raise UserError(
            f"patch {patch.name}: {patch.target} is missing, because {patch.module_name} has no "
            f"{'.'.join(patch.path)} of its own; try: the package version the patch was written for "
            f"({', '.join(patch.fingerprints)})"
        )
    return Location(owner, name, vars(owner)[name])


def fingerprint(value: Any) -> str:
    """Twelve hex digits of the source text of a function, method or class, trailing blanks ignored.

    Raises:
        OSError, TypeError: its source cannot be read (a built-in, or a file that is gone).
    """
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    return fingerprint_of_source(inspect.getsource(function))


def fingerprint_of_source(source: str) -> str:
    """As `fingerprint`, of the source text."""
    text = "\n".join(line.rstrip() for line in source.strip().splitlines())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_fingerprint(patch: Patch, value: Any, version: str) -> None:
    """Refuse a target whose source is not the one the patch was written against.

    Raises:
        UserError: it differs.
    """
    found = fingerprint(value)
    expected = patch.fingerprints.get(version)
    if found == expected or (expected is None and found in patch.fingerprints.values()):
        return
    raise UserError(
        f"patch {patch.name}: {patch.target} of version {version} is wrong, because its source ({found}) is not what "
        f"the patch was written against; legal: {dict(patch.fingerprints)}; try: install one of these versions"
    )
