"""One kind of state of all trained parameters in one array: on the device, or on the host and copied in stretches."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mindspeed_llm.memory.store import HostStore


class Array(Protocol):
    """Values of one type, [n], of which a stretch at a time is worked on.

    Attributes:
        values: all of them where they lie; on the host they are to be looked at after `settle`.
    """

    values: Tensor

    def fetch(self, start: int, stop: int) -> None:
        """Begin to bring a stretch to the device."""

    def wait_fetched(self, start: int, stop: int) -> Tensor:
        """The stretch, on the device, for work submitted from here on."""

    def send(self, start: int, stretch: Tensor) -> None:
        """Begin to bring back what `wait_fetched` gave and was changed since."""

    def wait_sent(self, start: int) -> None:
        """What is submitted from here on comes after that: the memory of the stretch may be used again."""

    def settle(self) -> None:
        """Wait until `values` are those of the last stretch that was sent."""


class DeviceArray:
    """See `Array`: stretches are views, and nothing is copied.

    Args:
        each: numbers that one value stands for, in which stretches are counted.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, each: int = 1):
        self.values, self._each = torch.zeros(numel // each, dtype=dtype, device=device), each

    def fetch(self, start: int, stop: int) -> None:
        """Nothing."""

    def wait_fetched(self, start: int, stop: int) -> Tensor:
        """The view."""
        return self.values[start // self._each : stop // self._each]

    def send(self, start: int, stretch: Tensor) -> None:
        """Nothing: the stretch is the array."""

    def wait_sent(self, start: int) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing: whoever reads values on the device comes after their computation."""


class HostArray:
    """See `Array`: in memory of the host that stays the same.

    Args:
        numel: above 0.
        each: numbers that one value stands for, in which stretches are counted.
    """

    def __init__(self, store: HostStore, numel: int, dtype: torch.dtype, each: int = 1):
        self._kept = store.keep(numel // each * dtype.itemsize)
        self.values = self._kept.memory.view(dtype)
        self._dtype, self._each = dtype, each

    def _place(self, at: int) -> int:
        return at // self._each * self._dtype.itemsize

    def fetch(self, start: int, stop: int) -> None:
        """Begin to copy."""
        self._kept.fetch(self._place(start), self._place(stop))

    def wait_fetched(self, start: int, stop: int) -> Tensor:
        """The copy."""
        return self._kept.wait_fetched(self._place(start)).view(self._dtype)

    def send(self, start: int, stretch: Tensor) -> None:
        """Begin to copy."""
        self._kept.send(self._place(start), stretch.view(torch.uint8))

    def wait_sent(self, start: int) -> None:
        """After the copy."""
        self._kept.wait_sent(self._place(start))

    def settle(self) -> None:
        """Wait for the last copy."""
        self._kept.settle()
