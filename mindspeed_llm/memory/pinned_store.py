"""Page-locked host memory, reached by two queues of the device beside the one that computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.memory.rooms import Rooms


class _Room:
    """Page-locked memory, and the event after which the last copy to or from it is done."""

    def __init__(self, size: int, instead: str = "a smaller --swap-budget GB"):
        try:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise UserError(
                f"swap: {size} bytes more of page-locked memory is wrong, because the host has none "
                f"({str(error).splitlines()[0]}); try: {instead}"
            ) from None
        self.last: Any = None


class PinnedStore:
    """See `HostStore`. Out and back have a queue each: links carry both directions at once."""

    kind = "page-locked memory"

    def __init__(self, device: Accelerator):
        self.device = device
        self._out, self._back = device.new_stream(), device.new_stream()
        self._rooms = Rooms()
        self._timed: list[tuple[Any, Any]] | None = None
        # Memory that a copy back is still writing although nobody asked for it any more.
        self._arriving: dict[int, tuple[Any, Tensor]] = {}

    @property
    def held(self) -> int:
        """Bytes that copies alive hold."""
        return self._rooms.held

    def measure(self, on: bool) -> None:
        """Time copies out from here on, or no more."""
        self._timed = [] if on else None

    def seconds_sending(self) -> float:
        """Time of the timed copies out, without what they waited for."""
        if not self._timed:
            return 0.0
        self._timed[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._timed) / 1e3

    def send(self, source: Tensor) -> _PinnedCopy:
        """Begin to copy uint8 [n] out, after the work submitted so far.

        Raises:
            UserError: the host has no page-locked memory left.
        """
        size, room = self._rooms.take(source.numel())
        room = room or _Room(size)
        self._out.wait_stream(self.device.current_stream())
        if room.last is not None:
            self._out.wait_event(room.last)
        with self.device.stream(self._out):
            begin = self._mark(self._out) if self._timed is not None else None
            room.memory[: source.numel()].copy_(source, non_blocking=True)
            room.last = self._mark(self._out)
        if begin is not None:
            self._timed.append((begin, room.last))
        copy = _PinnedCopy(self, room, source.numel())
        self._rooms.lend(copy, size, room, source.numel())
        return copy

    def bring(self, room: _Room, nbytes: int) -> Tensor:
        """Begin to copy the content of a room back; the memory for it is the computing queue's."""
        self._arriving = {key: kept for key, kept in self._arriving.items() if not kept[0].query()}
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device.current_device())
        # The memory may have been another tensor's that kernels submitted earlier still read; and it was sent before.
        self._back.wait_stream(self.device.current_stream())
        self._back.wait_event(room.last)
        with self.device.stream(self._back):
            target.copy_(room.memory[:nbytes], non_blocking=True)
            room.last = self._mark(self._back)
        self._arriving[id(target)] = room.last, target
        return target

    def await_arrival(self, target: Tensor, arrived: Any) -> None:
        """Make what is submitted from here on come after the copy back into `target`."""
        self.device.current_stream().wait_event(arrived)
        self._arriving.pop(id(target), None)

    def keep(self, nbytes: int) -> _PinnedKept:
        """See `HostStore.keep`.

        Raises:
            UserError: the host has no page-locked memory left.
        """
        return _PinnedKept(self, nbytes)

    def copy(self, target: Tensor, source: Tensor, out: bool) -> Any:
        """Begin to copy after the work submitted so far; an event that says when it is done."""
        stream = self._out if out else self._back
        stream.wait_stream(self.device.current_stream())
        with self.device.stream(stream):
            target.copy_(source, non_blocking=True)
            return self._mark(stream)

    def _mark(self, stream: Any) -> Any:
        event = self.device.new_event(enable_timing=self._timed is not None)
        event.record(stream)
        return event


class _PinnedCopy:
    """See `HostCopy`."""

    def __init__(self, store: PinnedStore, room: _Room, nbytes: int):
        self.nbytes = nbytes
        self._store, self._room = store, room
        self._sent = room.last
        self._target: Tensor | None = None
        self._arrived: Any = None

    def wait_sent(self) -> None:
        """The computing queue waits for the copy out."""
        self._store.device.current_stream().wait_event(self._sent)

    def fetch(self) -> None:
        """Begin to copy back."""
        self._target = self._store.bring(self._room, self.nbytes)
        self._arrived = self._room.last

    def wait_fetched(self) -> Tensor:
        """The content; the computing queue waits for it."""
        target, self._target = self._target, None
        self._store.await_arrival(target, self._arrived)
        return target


class _PinnedKept:
    """See `KeptMemory`."""

    def __init__(self, store: PinnedStore, nbytes: int):
        self.memory = _Room(nbytes, "more memory, or --swap-optimizer left out").memory.zero_()
        self._store = store
        self._coming: dict[int, tuple[Any, Tensor]] = {}
        self._going: dict[int, tuple[Any, Tensor]] = {}
        self._last: Any = None

    def fetch(self, start: int, stop: int) -> None:
        """Begin to copy to the device."""
        target = torch.empty(stop - start, dtype=torch.uint8, device=self._store.device.current_device())
        self._coming[start] = self._store.copy(target, self.memory[start:stop], out=False), target

    def wait_fetched(self, start: int) -> Tensor:
        """The bytes; the computing queue waits for them."""
        arrived, target = self._coming.pop(start)
        self._store.device.current_stream().wait_event(arrived)
        return target

    def send(self, start: int, source: Tensor) -> None:
        """Begin to copy back."""
        target = self.memory[start : start + source.numel()]
        self._going[start] = self._store.copy(target, source, out=True), source

    def wait_sent(self, start: int) -> None:
        """The computing queue waits for the copy."""
        self._last, _ = self._going.pop(start)
        self._store.device.current_stream().wait_event(self._last)

    def settle(self) -> None:
        """Wait for the last copy back; those before it went by the same queue."""
        if self._last is not None:
            self._last.synchronize()
