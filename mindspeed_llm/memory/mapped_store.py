"""A memory-mapped file in the place of host memory, and a thread in the place of a device's queue: swap for a CPU.

The thread copies from and to bare addresses, as a device does: who drops a tensor before the copy has been waited for,
or reads one that has not arrived, errs here as there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import tempfile
import threading
import time
import weakref

import torch
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.memory.rooms import Rooms


class _Room:
    """A stretch of the file."""

    def __init__(self, file: int, offset: int, size: int):
        self.map = mmap.mmap(file, size, offset=offset)
        # The view keeps the mapping in place and knows its address.
        self.memory = torch.frombuffer(self.map, dtype=torch.uint8)

    def forget_pages(self) -> None:
        """What was written is the file's from now on, and no memory of this process."""
        self.map.madvise(mmap.MADV_DONTNEED)


class _Job:
    """One copy between addresses, in the order of the queue."""

    def __init__(self, target: int, source: int, nbytes: int, room: _Room, out: bool):
        self.target, self.source, self.nbytes, self.room, self.out = target, source, nbytes, room, out
        self.done = threading.Event()
        self.seconds = 0.0
        self._failure: Exception | None = None

    def run(self) -> None:
        """Copy; what goes wrong is for whoever waits."""
        begun = time.perf_counter()
        try:
            ctypes.memmove(self.target, self.source, self.nbytes)  # without the interpreter's lock
            if self.out:
                self.room.forget_pages()
        except Exception as wrong:
            self._failure = wrong
        self.seconds = time.perf_counter() - begun
        self.done.set()

    def wait(self) -> None:
        """Until it is done.

        Raises:
            RuntimeError: it failed.
        """
        self.done.wait()
        if self._failure is not None:
            raise RuntimeError(f"swap: a copy of {self.nbytes} bytes failed") from self._failure


class MappedStore:
    """See `HostStore`."""

    kind = "a memory-mapped file"

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._size = 0
        self._rooms = Rooms()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._timed: list[_Job] | None = None
        # Memory that a copy back is still writing although nobody asked for it any more.
        self._arriving: dict[int, tuple[_Job, Tensor]] = {}
        worker = threading.Thread(target=_work, args=(self._jobs,), name="activation-swap", daemon=True)
        worker.start()
        weakref.finalize(self, _end, self._jobs, worker)

    @property
    def held(self) -> int:
        """Bytes that copies alive hold."""
        return self._rooms.held

    def measure(self, on: bool) -> None:
        """Time copies out from here on, or no more."""
        self._timed = [] if on else None

    def seconds_sending(self) -> float:
        """Time of the timed copies out."""
        for job in self._timed or ():
            job.wait()
        return sum(job.seconds for job in self._timed or ())

    def send(self, source: Tensor) -> _MappedCopy:
        """Begin to copy uint8 [n] into the file.

        Raises:
            UserError: the file system has no room.
        """
        nbytes = source.numel()
        size, room = self._rooms.take(nbytes)
        room = room or self._new_room(size)
        job = self._submit(_Job(room.memory.data_ptr(), source.data_ptr(), nbytes, room, out=True))
        if self._timed is not None:
            self._timed.append(job)
        copy = _MappedCopy(self, room, nbytes, job)
        self._rooms.lend(copy, size, room, nbytes)
        return copy

    def bring(self, room: _Room, nbytes: int) -> tuple[Tensor, _Job]:
        """Begin to copy the content of a room back."""
        self._arriving = {key: kept for key, kept in self._arriving.items() if not kept[0].done.is_set()}
        target = torch.empty(nbytes, dtype=torch.uint8)
        job = self._submit(_Job(target.data_ptr(), room.memory.data_ptr(), nbytes, room, out=False))
        self._arriving[id(target)] = job, target
        return target, job

    def await_arrival(self, target: Tensor, job: _Job) -> None:
        """Wait for the copy back into `target`."""
        job.wait()
        self._arriving.pop(id(target), None)

    def keep(self, nbytes: int) -> _MappedKept:
        """See `HostStore.keep`.

        Raises:
            UserError: the file system has no room.
        """
        return _MappedKept(self, self._new_room(nbytes), nbytes)

    def copy(self, target: Tensor, source: Tensor, room: _Room, out: bool) -> _Job:
        """Begin to copy between memory of a room and other memory, of the same size."""
        return self._submit(_Job(target.data_ptr(), source.data_ptr(), source.numel(), room, out))

    def _submit(self, job: _Job) -> _Job:
        self._jobs.put(job)
        return job

    def _new_room(self, size: int) -> _Room:
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        offset, self._size = self._size, self._size + size
        try:
            # A mapped page without a block behind it would end the process when it is written.
            os.posix_fallocate(self._file.fileno(), offset, size)
        except OSError as error:
            raise UserError(
                f"swap: {tempfile.gettempdir()} is wrong, because {self._size} bytes of swapped tensors do not fit "
                f"there ({error.strerror}); legal: a directory with more room; try: TMPDIR=DIR, or less that is swapped"
            ) from None
        return _Room(self._file.fileno(), offset, size)


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()


def _end(jobs: queue.SimpleQueue[_Job | None], worker: threading.Thread) -> None:
    jobs.put(None)
    worker.join()


class _MappedCopy:
    """See `HostCopy`."""

    def __init__(self, store: MappedStore, room: _Room, nbytes: int, job: _Job):
        self.nbytes = nbytes
        self._store, self._room, self._sending = store, room, job
        self._target: Tensor | None = None
        self._fetching: _Job | None = None

    def wait_sent(self) -> None:
        """Wait for the copy out."""
        self._sending.wait()

    def fetch(self) -> None:
        """Begin to copy back."""
        self._target, self._fetching = self._store.bring(self._room, self.nbytes)

    def wait_fetched(self) -> Tensor:
        """The content, when it is there."""
        target, self._target = self._target, None
        self._store.await_arrival(target, self._fetching)
        return target


class _MappedKept:
    """See `KeptMemory`."""

    def __init__(self, store: MappedStore, room: _Room, nbytes: int):
        self.memory = room.memory[:nbytes]
        self._store, self._room = store, room
        self._coming: dict[int, tuple[_Job, Tensor]] = {}
        self._going: dict[int, tuple[_Job, Tensor]] = {}

    def fetch(self, start: int, stop: int) -> None:
        """Begin to copy out of the file."""
        target = torch.empty(stop - start, dtype=torch.uint8)
        self._coming[start] = self._store.copy(target, self.memory[start:stop], self._room, out=False), target

    def wait_fetched(self, start: int) -> Tensor:
        """The bytes, when they are there."""
        job, target = self._coming.pop(start)
        job.wait()
        return target

    def send(self, start: int, source: Tensor) -> None:
        """Begin to copy into the file."""
        target = self.memory[start : start + source.numel()]
        self._going[start] = self._store.copy(target, source, self._room, out=True), source

    def wait_sent(self, start: int) -> None:
        """Wait for the copy."""
        job, _ = self._going.pop(start)
        job.wait()

    def settle(self) -> None:
        """Nothing: `wait_sent` has waited."""
