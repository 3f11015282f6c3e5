"""Where swapped tensors lie while the device does without them: the interface, and the choice for a device."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor

from mindspeed_llm import accelerator


class HostCopy(Protocol):
    """The content of one storage outside the device. Dropping the object gives its room back."""

    nbytes: int

    def wait_sent(self) -> None:
        """What is submitted from here on comes after the copy out: the source may be dropped or overwritten."""

    def fetch(self) -> None:
        """Begin to copy back into new memory of the device."""

    def wait_fetched(self) -> Tensor:
        """The content, uint8 [nbytes] on the device; what is submitted from here on sees it. `fetch` came before."""


class HostStore(Protocol):
    """Copies storages out and back beside the device's work.

    Attributes:
        held: bytes that copies alive hold.
        kind: what holds them, in words.
    """

    held: int
    kind: str

    def send(self, source: Tensor) -> HostCopy:
        """Begin to copy `source`, uint8 [n] on the device, out, after the work submitted so far.

        The caller keeps the source until `wait_sent`.
        """

    def measure(self, on: bool) -> None:
        """Whether copies out are timed from here on; what was measured before is forgotten."""

    def seconds_sending(self) -> float:
        """Time of the timed copies out, one after the other; waits for the last of them."""


def open_store() -> HostStore:
    """The store of this process's device: page-locked memory, or for a CPU a file, since its memory is the host's."""
    device = accelerator.current()
    if device.supports_pin_memory:
        from mindspeed_llm.memory.pinned_store import PinnedStore

        return PinnedStore(device)
    from mindspeed_llm.memory.mapped_store import MappedStore

    return MappedStore()


class Rooms:
    """Rooms of a store that are used again and again: allocating them is slow, and steps repeat their sizes.

    A room is at most twice as large as what lies in it; sizes are rounded to quarters of powers of two, so that batches
    of varying length find each other's.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}
        self.held = 0

    def take(self, nbytes: int) -> tuple[int, Any | None]:
        """Size of the room for `nbytes`, and a free one of at least that size if there is any."""
        size = rounded(nbytes)
        fitting = [s for s, rooms in self._free.items() if rooms and size <= s <= 2 * size]
        if not fitting:
            return size, None
        size = min(fitting)
        return size, self._free[size].pop()

    def lend(self, copy: object, size: int, room: Any, nbytes: int) -> None:
        """Count the room as used until `copy` is no more."""
        self.held += nbytes
        self._free.setdefault(size, [])  # here, since rooms come back at any time, during a look at all sizes too
        weakref.finalize(copy, self._give_back, size, room, nbytes).atexit = False

    def _give_back(self, size: int, room: Any, nbytes: int) -> None:
        self.held -= nbytes
        self._free[size].append(room)


def rounded(nbytes: int, smallest: int = 4096) -> int:
    """The next of the sizes 4, 5, 6, 7 times a power of two, at least a page, so that at most a fifth is unused."""
    step = 1 << max((nbytes - 1).bit_length() - 3, 0)
    return max(-(-nbytes // step) * step, smallest)
