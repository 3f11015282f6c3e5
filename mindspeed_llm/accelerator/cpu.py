"""The CPU as an accelerator: one device, one queue, host memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from typing import Any

import torch

from mindspeed_llm.accelerator import host_memory, profiling
from mindspeed_llm.config.profiling import ProfilingConfig


class HostEvent:
    """A point in time. Work on a CPU is done when the call returns, so waiting is free."""

    def __init__(self, enable_timing: bool = False, **_kinds: object):
        self._seconds: float | None = None

    def record(self, stream: object = None) -> None:
        """Remember the time; `stream` is the only one there is."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for: CPU work is finished when submitted."""

    def synchronize(self) -> None:
        """Nothing to wait for: CPU work is finished when submitted."""

    def query(self) -> bool:
        """Whether the work is done: always."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("both events must be recorded before elapsed_time")
        return (end._seconds - self._seconds) * 1e3


class HostStream:
    """The program order of the calling thread, with the interface of a device queue."""

    device = torch.device("cpu")

    def __init__(self, device: object = None, priority: int = 0, **_kinds: object):
        self.priority = priority

    def wait_stream(self, stream: object) -> None:
        """Program order already orders the work."""

    def wait_event(self, event: object) -> None:
        """Program order already orders the work."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record an event (a new one when none is given) and return it."""
        event = event or HostEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """CPU work is finished when submitted."""

    def query(self) -> bool:
        """Whether the work is done: always."""
        return True

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


class CPU:
    """See `protocol.Accelerator`. torch does not track tensor memory on CPUs; resident memory is reported instead."""

    name = "cpu"
    device_type = "cpu"
    distributed_backend = "gloo"
    supports_pin_memory = False
    reduces_float64 = True

    def __init__(self) -> None:
        self._stream = HostStream()

    def is_available(self) -> bool:
        return True

    def why_unavailable(self) -> str:
        return ""

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, index: int) -> None:
        """There is one CPU device; ranks of a node share it whatever their index."""

    def synchronize(self) -> None:
        """CPU work is finished when submitted."""

    def stream(self, stream: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(stream)

    def stream_type(self) -> type:
        return HostStream

    def event_type(self) -> type:
        return HostEvent

    def new_stream(self) -> HostStream:
        return HostStream()

    def current_stream(self) -> HostStream:
        return self._stream

    def new_event(self, enable_timing: bool = False) -> HostEvent:
        return HostEvent(enable_timing)

    def generator(self) -> torch.Generator:
        return torch.default_generator

    def memory_allocated(self) -> int:
        return 0

    def peak_memory_allocated(self) -> int:
        return 0

    def reset_peak_memory(self) -> None:
        """No peak of tensor memory is kept on a CPU; see `peak_resident_memory`."""

    def highest_memory_allocated(self) -> int:
        return 0

    def memory_total(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def memory_room(self) -> int:
        room, addresses = host_memory.host_room(), host_memory.address_room()
        return room if addresses is None else min(room, addresses)

    def memory_in_pieces(self) -> int:
        return 0

    def resident_memory(self) -> int:
        return host_memory.resident_bytes()

    def peak_resident_memory(self) -> int:
        """Highest resident set size of the process so far, bytes (ru_maxrss is in KiB on Linux)."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def profiler(self, options: ProfilingConfig, worker: str) -> Any:
        return profiling.torch_profiler(options, worker, "cpu")

    def empty_cache(self) -> None:
        """The host allocator keeps no cache of ours."""

    def model(self) -> str:
        return platform.machine()

    def group_options(self, description: str | None) -> None:
        return None

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return None
