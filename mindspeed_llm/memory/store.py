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
