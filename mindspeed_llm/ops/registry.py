"""Which implementation of an operator runs on which device; chosen once, shown by `chosen()`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindspeed_llm import accelerator, ops
from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Args:
        operator, name: what it computes and what it is called, e.g. ("rms_norm", "torch").
        function: the callable, with the operator's signature.
        devices: device types it runs on; () means all.
        requires: Python packages it needs.
        unless: says why it cannot run here beyond that, None when it can.
        priority: the highest available one is chosen when the user names none.
    """

    operator: str
    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    priority: int = 0
    unless: Callable[[], str | None] | None = None

    def missing(self, device_type: str) -> str | None:
        """Why it cannot run on this device, None when it can."""
        if self.devices and device_type not in self.devices:
            return f"it runs on {', '.join(self.devices)} and the device is {device_type}"
        absent = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if absent:
            return f"it needs the package {', '.join(absent)}"
        return None if self.unless is None else self.unless()


# The plain formula of an operator is registered under this name; it is used only when selected.
REFERENCE = "reference"

_implementations: dict[str, list[Implementation]] = {}
_chosen: dict[str, Implementation] = {}


def register(
    operator: str,
    name: str,
    *,
    devices: tuple[str, ...] = (),
    requires: tuple[str, ...] = (),
    priority: int = 0,
    unless: Callable[[], str | None] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator: enter a function as an implementation of `operator`."""

    def enter(function: Callable) -> Callable:
        entries = _implementations.setdefault(operator, [])
        if any(entry.name == name for entry in entries):
            raise ValueError(f"operator {operator} has an implementation called {name} already")
        entries.append(Implementation(operator, name, function, devices, requires, priority, unless))
        return function

    return enter


def implementation(operator: str) -> Callable[..., Any]:
    """The function that computes `operator` on this process's device; the choice is made at the first call."""
    if operator not in _chosen:
        ops.load_all()  # the choice must not depend on what happens to be imported
        device_type = accelerator.current().device_type
        usable = [entry for entry in _known(operator) if entry.missing(device_type) is None]
        _chosen[operator] = max(usable, key=lambda entry: entry.priority)
    return _chosen[operator].function


def select(operator: str, name: str) -> None:
    """Use the implementation called `name` from now on.

    Raises:
        UserError: there is none of that name, or it cannot run here; the message names what is missing.
    """
    device_type = accelerator.current().device_type
    entries = {entry.name: entry for entry in _known(operator)}
    usable = [entry.name for entry in entries.values() if entry.missing(device_type) is None]
    if name not in entries:
        raise UserError(f"{operator}: {name} is wrong, because there is none of that name; legal: {', '.join(usable)}")
    if reason := entries[name].missing(device_type):
        raise UserError(f"{operator}: {name} is wrong, because {reason}; legal: {', '.join(usable)}")
    _chosen[operator] = entries[name]


def operators() -> list[str]:
    """Names of all operators of the package."""
    ops.load_all()
    return sorted(_implementations)


def implementations(operator: str) -> list[Implementation]:
    """Every implementation of an operator, available here or not."""
    ops.load_all()
    return list(_known(operator))


def chosen() -> dict[str, str]:
    """Operator -> name of the implementation in use, for every operator of the package."""
    ops.load_all()
    for operator in _implementations:
        implementation(operator)
    return {operator: _chosen[operator].name for operator in sorted(_implementations)}


def reset() -> None:
    """Forget the choices; the next use chooses again."""
    _chosen.clear()


def _known(operator: str) -> list[Implementation]:
    if operator not in _implementations:
        raise UserError(
            f"operator: {operator!r} is wrong, because none is registered; legal: {sorted(_implementations)}"
        )
    return _implementations[operator]
