"""How much may be swapped: what transfers in the time of computing, or what fits into some gigabytes of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_llm import accelerator
from mindspeed_llm.memory.store import HostStore

# Rounds (see `Order`) that are measured, after a first one in which memory is allocated.
MEASURED_ROUNDS = 3
# Of a layer's time that may be filled with transfers: times vary, and a link is shared with others.
FILLED = 0.9


class UpToHostBytes:
    """Swap whatever comes while the copies on the host take no more than `limit` bytes."""

    def __init__(self, store: HostStore, limit: int):
        self._store, self.limit = store, limit

    def choose(self, offered: Mapping[int, int]) -> list[int]:
        """Which of a layer's storages go, of {key: bytes}."""
        return _largest(offered, self.limit - self._store.held)

    def begin_round(self) -> str | None:
        """Nothing is measured."""
        return None

    def begin_layer(self) -> None:
        """Nothing is measured."""

    def end_layer(self, nbytes: int) -> None:
        """Nothing is measured."""


class WhatHides:
    """Swap the part of every layer's saved tensors that its own computation takes the time to transfer.

    The first rounds swap everything, and measure: seconds of the layers' forward passes beside seconds of their copies
    out. Copies back have a backward pass, which takes at least as long.

    Attributes:
        fraction: of the bytes a layer offers.
    """

    def __init__(self, store: HostStore):
        self._store, self.fraction = store, 1.0
        self._round = 0
        self._bytes = 0
        self._begun: Any = None
        self._layers: list[tuple[Any, Any]] = []

    @property
    def _measuring(self) -> bool:
        return 1 < self._round <= 1 + MEASURED_ROUNDS

    def choose(self, offered: Mapping[int, int]) -> list[int]:
        """Which of a layer's storages go, of {key: bytes}."""
        return _largest(offered, self.fraction * sum(offered.values()))

    def begin_round(self) -> str | None:
        """Measure, or come to a conclusion and say it."""
        self._round += 1
        if self._round == 2:
            self._store.measure(True)
        if self._round == 2 + MEASURED_ROUNDS:
            return self._conclude()
        return None

    def begin_layer(self) -> None:
        """The forward pass of a layer begins."""
        if self._measuring:
            self._begun = self._mark()

    def end_layer(self, nbytes: int) -> None:
        """It has ended, and so many bytes go; what it waits for earlier copies comes later."""
        if self._measuring and self._begun is not None and nbytes:
            self._layers.append((self._begun, self._mark()))
            self._bytes += nbytes
        self._begun = None

    def _mark(self) -> Any:
        event = accelerator.current().new_event(enable_timing=True)
        event.record(accelerator.current().current_stream())
        return event

    def _conclude(self) -> str | None:
        if not self._layers:
            self._store.measure(False)
            return None
        self._layers[-1][1].synchronize()
        computing = sum(begin.elapsed_time(end) for begin, end in self._layers) / 1e3
        sending = self._store.seconds_sending()
        self._store.measure(False)
        self.fraction = min(1.0, FILLED * computing / max(sending, 1e-9))
        each = len(self._layers)
        self._layers = []
        return (
            f"swap: {100 * self.fraction:.0f} % of {self._bytes / each / 2**20:.1f} MiB per layer go to "
            f"{self._store.kind}: a layer computes {1e3 * computing / each:.2f} ms, and sends them in "
            f"{1e3 * sending / each:.2f} ms ({self._bytes / max(sending, 1e-9) / 1e9:.1f} GB/s)"
        )


def _largest(offered: Mapping[int, int], limit: float) -> list[int]:
    """Keys of the largest values that together stay within `limit`, in their order."""
    chosen, total = [], 0
    for key in sorted(offered, key=offered.get, reverse=True):
        if total + offered[key] <= limit:
            chosen.append(key)
            total += offered[key]
    return sorted(chosen)
