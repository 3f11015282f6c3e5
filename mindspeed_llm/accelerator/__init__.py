"""Devices behind one protocol. `current()` is the device of this process; importing this room initialises none."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.accelerator.protocol import Accelerator

# Order of preference when the user names none.
NAMES = ("cuda", "cpu")
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
    if name == "cpu":
        from mindspeed_llm.accelerator.cpu import CPU

        return CPU()
    raise UserError(f"device: {name!r} is wrong, because no accelerator has that name; legal: {', '.join(NAMES)}")


@functools.cache
def current() -> Accelerator:
    """The accelerator of this process: the one named by MINDSPEED_LLM_DEVICE, else the first available of `NAMES`.

    Raises:
        UserError: the named device does not exist or is not available here.
    """
    if wanted := os.environ.get(ENVIRONMENT_VARIABLE):
        chosen = get(wanted)
        if not chosen.is_available():
            raise UserError(
                f"{ENVIRONMENT_VARIABLE}: {wanted} is wrong, because torch sees no such device here; "
                f"legal: {', '.join(name for name in NAMES if get(name).is_available())}; try: unset it"
            )
        return chosen
    return next(get(name) for name in NAMES if get(name).is_available())
