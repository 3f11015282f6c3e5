"""Devices behind one protocol. `current()` is the device of this process; importing this room initialises none."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.accelerator.protocol import Accelerator

# Order of preference when the user names none.
NAMES = ("cuda", "npu", "cpu")
ENVIRONMENT_VARIABLE = "MINDSPEED_LLM_DEVICE"


@functools.cache
def get(name: str) -> Accelerator:
    """The accelerator called `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name == "cuda":
        from mindspeed_llm.accelerator.cuda import CUDA

        return CUDA()
    if name == "npu":
        from mindspeed_llm.accelerator.npu import NPU

        return NPU()
    if name == "cpu":
        from mindspeed_llm.accelerator.cpu import CPU

        return CPU()
    raise UserError(f"device: {name!r} is wrong, because no accelerator has that name; legal: {', '.join(NAMES)}")


@functools.cache
def current() -> Accelerator:
    """The accelerator of this process: the one selected, else named by MINDSPEED_LLM_DEVICE, else the first available.

    Raises:
        UserError: the named device does not exist or is not available here.
    """
    if wanted := os.environ.get(ENVIRONMENT_VARIABLE):
        return available(wanted, ENVIRONMENT_VARIABLE)
    return next(get(name) for name in NAMES if get(name).is_available())


def select(name: str) -> Accelerator:
    """Make the accelerator called `name` this process's, and megatron's view of torch follow it.

    To be called before tensors or process groups are made, and before operators have run.

    Raises:
        UserError: the device does not exist or is not available here.
    """
    from mindspeed_llm.accelerator import torch_facade

    chosen = available(name, "device")
    # The environment is how processes started by this one learn of it.
    os.environ[ENVIRONMENT_VARIABLE] = name
    current.cache_clear()
    prefixes = torch_facade.uninstall(unless=chosen)
    torch_facade.install(chosen, prefixes)
    return chosen


def show_to_megatron(name: str = "auto") -> None:
    """Let megatron-core find the device called `name` (`auto`: this process's), and no packages of another.

    To be called before any of megatron-core is loaded: it looks for optional packages while it loads.

    Raises:
        UserError: the device does not exist or is not available here.
    """
    from mindspeed_llm.accelerator import torch_facade

    if name == "auto":
        torch_facade.install(current())
    else:
        select(name)  # which shows it too


def available(name: str, asked_by: str) -> Accelerator:
    """The accelerator called `name`.

    Args:
        asked_by: where the name is from, for the message.

    Raises:
        UserError: there is none of that name, or not here.
    """
    chosen = get(name)
    if not chosen.is_available():
        raise UserError(
            f"{asked_by}: {name} is wrong, because {chosen.why_unavailable()}; "
            f"legal: {', '.join(other for other in NAMES if get(other).is_available())}"
        )
    return chosen
