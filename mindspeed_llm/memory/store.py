"""Where swapped tensors lie while the device does without them: the interface, and the choice for a device."""

from __future__ import annotations

from typing import Protocol

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


class KeptMemory(Protocol):
    """Memory outside the device that stays where it is, and of which stretches are copied to the device and back.

    A stretch is known by where it begins. None overlaps another between its `fetch` and its `wait_sent`.

    Attributes:
        memory: uint8 [nbytes] of the host, zeros at first; after `settle` it may be read and written there.
    """

    memory: Tensor

    def fetch(self, start: int, stop: int) -> None:
        """Begin to copy bytes [start, stop) into new memory of the device."""

    def wait_fetched(self, start: int) -> Tensor:
        """The bytes on the device; what is submitted from here on sees them."""

    def send(self, start: int, source: Tensor) -> None:
        """Begin to copy `source`, uint8 on the device, to `start`, after the work submitted so far."""

    def wait_sent(self, start: int) -> None:
        """What is submitted from here on comes after that copy; `source` is let go."""

    def settle(self) -> None:
        """Wait on the host for every copy that `wait_sent` was called for."""


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

    def keep(self, nbytes: int) -> KeptMemory:
        """Take memory that stays the caller's.

        Args:
            nbytes: above 0.
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
