"""The host's stream of random numbers, as a program sees it that takes host and device for two.

A CPU's kernels draw from torch's default generator, which is therefore the *device* generator of a CPU run. The host's
stream, which megatron saves, checks, and draws initial weights from (`use_cpu_initialization`), is one beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

_generator = torch.Generator()
_seeded = False


def _manual_seed(seed: int) -> torch.Generator:
    """`torch.manual_seed`: the host's stream and the devices'."""
    global _seeded
    _seeded = True
    _generator.manual_seed(seed)
    return torch.manual_seed(seed)


def names() -> dict[str, Callable]:
    """What the names of torch's module mean to a program on a CPU."""
    return {
        "manual_seed": _manual_seed,
        "get_rng_state": _generator.get_state,
        "set_rng_state": _generator.set_state,
    }


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Within it, what is drawn without a generator comes from the host's stream and leaves the device's alone.

    Where the program has not called `torch.manual_seed` itself, the streams were seeded as one, and stay one.
    """
    if not _seeded:
        yield
        return
    device = torch.default_generator
    outer = device.get_state()
    device.set_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(device.get_state())
        device.set_state(outer)
