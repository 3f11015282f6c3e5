"""`tensor.device.type == "cuda"`, asked by a program's module: true for the tensors of the device at hand.

torch.device takes no subclass, and a look-alike is refused by every function of torch that parses it in C. So its
attribute `type` is read through a property while a facade is installed: modules of the program get a string of the same
characters, "cpu" or "npu", that equals "cuda" too when one of them compares it; everybody else gets torch's own string.
Where host and device are one it equals "cpu" as well as "cuda", as both are true.

Not reached: `device.type in {"cuda"}`, which compares hashes first, and `"cuda" in str(device)`.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_llm.accelerator.protocol import Accelerator


def install(accelerator: Accelerator, is_ours: Callable[[str], bool]) -> Callable[[], None]:
    """Read `torch.device.type` through a property.

    Args:
        is_ours: whether a module of that name belongs to the program.

    Returns:
        What gives torch.device its own attribute back.
    """
    own = torch.device.__dict__["type"]
    text = _text_class(_called_by(is_ours))

    def type_of_device(device: torch.device) -> str:
        answer = own.__get__(device)
        is_device = answer == accelerator.device_type
        return text(answer) if is_device and is_ours(sys._getframe(1).f_globals.get("__name__", "")) else answer

    _set_type(property(type_of_device, doc=own.__doc__))
    return lambda: _set_type(own)


def _called_by(is_ours: Callable[[str], bool]) -> Callable[[], bool]:
    return lambda: is_ours(sys._getframe(2).f_globals.get("__name__", ""))


def _text_class(compared_by_ours: Callable[[], bool]) -> type[str]:
    class DeviceType(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> Any:
            plain = str.__eq__(self, other)
            return compared_by_ours() if plain is False and str.__eq__("cuda", other) else plain

        def __ne__(self, other: object) -> Any:
            plain = str.__ne__(self, other)
            return not compared_by_ours() if plain is True and str.__eq__("cuda", other) else plain

        def __reduce__(self) -> tuple:  # a file of the program holds the string itself
            return str, (str(self),)

    return DeviceType


def _set_type(attribute: Any) -> None:
    """Set `torch.device.type`: the class is immutable to `setattr`, so that it is written to its dictionary."""
    names = next(held for held in gc.get_referents(torch.device.__dict__) if isinstance(held, dict))
    names["type"] = attribute
    # Python remembers where it found an attribute of a class until it is told that the class has changed.
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(torch.device))
