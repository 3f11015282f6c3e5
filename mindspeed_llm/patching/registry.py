"""Apply a catalogue of patches, say what was applied and why, and undo it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.patching.patch import Location, Patch, check_fingerprint, locate

# The distribution whose version the fingerprints of a top-level package are looked up under.
DISTRIBUTIONS = {"megatron": "megatron-core"}


@dataclass
class Applied:
    """A patch in force, and every place that was rebound for it."""

    patch: Patch
    location: Location
    new: Any
    rebound: list[tuple[Any, str]] = field(default_factory=list)


_applied: dict[str, Applied] = {}


def installed_version(module_name: str) -> str:
    """The version of the distribution that `module_name` belongs to, 'unversioned' when it is not an installed one."""
    top = module_name.split(".")[0]
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(top, top))
    except importlib.metadata.PackageNotFoundError:
        return "unversioned"


def apply(catalogue: Sequence[Patch], config: Any = None) -> list[str]:
    """Put the patches of a catalogue in force, all or none.

    Those without a condition apply always, those with one when `config` is given and their condition holds. What is in
    force already is left as it is, so applying twice is applying once; the order of the catalogue has no effect because
    two patches of one target are a conflict.

    Args:
        config: the final configuration, None while it is not known yet.

    Returns:
        Names of the patches newly applied, in the catalogue's order.

    Raises:
        UserError: a missing target, a target with an unknown source, or two patches that change the same thing.
    """
    wanted = [
        patch
        for patch in catalogue
        if (patch.condition is None or (config is not None and patch.condition(config)))
        and patch.concerns(installed_version(patch.module_name))
        and patch.is_installed()
    ]
    new = [patch for patch in wanted if _applied.get(patch.name) is None or _applied[patch.name].patch != patch]
    _check_conflicts([entry.patch for entry in _applied.values()] + new)
    located = [(patch, locate(patch)) for patch in new]
    for patch, location in located:
        check_fingerprint(patch, location.value, installed_version(patch.module_name))
    for patch, location in located:
        _applied[patch.name] = _put_in_force(patch, location)
    return [patch.name for patch in new]


def undo(names: Iterable[str] | None = None) -> list[str]:
    """Take patches out of force (all of them when `names` is None) and restore what they replaced.

    Returns:
        Names of the patches undone.
    """
    chosen = [name for name in reversed(list(_applied)) if names is None or name in set(names)]
    for name in chosen:
        entry = _applied.pop(name)
        for owner, attribute in reversed(entry.rebound):
            setattr(owner, attribute, entry.location.value)
        _restore_imported(entry)
    return chosen


def applied() -> list[Patch]:
    """The patches in force."""
    return [entry.patch for entry in _applied.values()]


def why(name: str) -> str:
    """What a patch in force changes, where, and the reason.

    Raises:
        UserError: no patch of that name is in force.
    """
    if name not in _applied:
        raise UserError(f"patch: {name!r} is wrong, because it is not in force; legal: {', '.join(_applied) or 'none'}")
    entry = _applied[name]
    places = ", ".join(f"{getattr(owner, '__name__', owner)}.{attribute}" for owner, attribute in entry.rebound)
    kind = "replaces" if entry.patch.wrap is None else "wraps"
    return f"{name} {kind} {entry.patch.target} (bound at {places}): {entry.patch.why}"


def _check_conflicts(patches: Sequence[Patch]) -> None:
    by_target: dict[str, Patch] = {}
    for patch in patches:
        for target, other in by_target.items():
            same = patch.target == target
            nested = patch.target.startswith(target + ".") or target.startswith(patch.target + ".")
            if same or nested or patch.name == other.name:
                raise UserError(
                    f"patches: {other.name} and {patch.name} cannot both be applied, because they change {target} and "
                    f"{patch.target}; try: undo one of them first"
                )
        by_target[patch.target] = patch


def _put_in_force(patch: Patch, location: Location) -> Applied:
    original = location.value
    plain = original.__func__ if isinstance(original, staticmethod | classmethod) else original
    new = patch.replace if patch.wrap is None else patch.wrap(plain)
    if isinstance(original, staticmethod | classmethod):
        new = type(original)(new)
    entry = Applied(patch, location, new)
    setattr(location.owner, location.name, new)
    entry.rebound.append((location.owner, location.name))
    if len(patch.path) == 1:
        _rebind_imported(entry)
    return entry


def _rebind_imported(entry: Applied) -> None:
    """Rebind names that other modules hold because they imported the original by value, under whatever name."""
    for module, name in _names_of(entry.location.value):
        if module is not entry.location.owner:
            setattr(module, name, entry.new)
            entry.rebound.append((module, name))


def _restore_imported(entry: Applied) -> None:
    """Give the original to modules that were loaded meanwhile, and imported the new object by value.

    What a patch wraps can be had from the target alone; a replacement stands in its own module under a name of its own.
    """
    if len(entry.patch.path) > 1 or entry.new is entry.location.value:
        return
    for module, name in _names_of(entry.new):
        if entry.patch.wrap is not None or name == entry.location.name:
            setattr(module, name, entry.location.value)


def _names_of(value: Any) -> list[tuple[ModuleType, str]]:
    """Where loaded modules hold `value` itself: module and name."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    return [(module, name) for module in modules for name, held in list(vars(module).items()) if held is value]
