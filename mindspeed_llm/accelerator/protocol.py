"""What a device is to this library: the one interface through which rooms and megatron's facade see it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from mindspeed_llm.config.profiling import ProfilingConfig


class Accelerator(Protocol):
    """A device type: where tensors live, which collectives it has, how its streams, generators and memory are read.

    Attributes:
        name: the word that selects it (`cpu`, `cuda`, `npu`).
        device_type: torch's device type string.
        distributed_backend: the torch.distributed backend for tensors on it (`gloo`, `nccl`, `hccl`).
        supports_pin_memory: whether host memory can be page-locked for faster copies to it.
        reduces_float64: whether its collectives can add float64.
    """

    name: str
    device_type: str
    distributed_backend: str
    supports_pin_memory: bool
    reduces_float64: bool

    def is_available(self) -> bool:
        """Whether this process can use the device; initialises nothing."""

    def why_unavailable(self) -> str:
        """What is missing, for an error message; "" when nothing is."""

    def device_count(self) -> int:
        """Number of devices visible to this process (1 for a CPU)."""

    def current_device(self) -> torch.device:
        """The device new tensors of this process belong on."""

    def set_device(self, index: int) -> None:
        """Make device `index` the current one."""

    def synchronize(self) -> None:
        """Wait until all submitted work is done."""

    def stream(self, stream: Any) -> AbstractContextManager:
        """Context in which work is submitted to `stream` (None: unchanged)."""

    def stream_type(self) -> type:
        """The class of `new_stream`; initialises nothing."""

    def event_type(self) -> type:
        """The class of `new_event`; initialises nothing."""

    def new_stream(self) -> Any:
        """A new work queue with wait_stream, wait_event, record_event, synchronize."""

    def current_stream(self) -> Any:
        """The queue work is submitted to now."""

    def new_event(self, enable_timing: bool = False) -> Any:
        """A new marker with record, wait, query, synchronize, elapsed_time (ms)."""

    def generator(self) -> torch.Generator:
        """The generator that random kernels on this device draw from."""

    def memory_allocated(self) -> int:
        """Bytes held by tensors on the device; 0 where that is not measured."""

    def peak_memory_allocated(self) -> int:
        """Highest `memory_allocated` since the last reset, bytes; 0 where that is not measured."""

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""

    def highest_memory_allocated(self) -> int:
        """Highest `memory_allocated` of this process, whatever was reset through here; 0 where it is not measured."""

    def memory_total(self) -> int:
        """Bytes of memory the device has."""

    def memory_room(self) -> int:
        """Bytes that this process can still take for tensors; on a host that several share, its part of them."""

    def memory_in_pieces(self) -> int:
        """Bytes of `memory_room` that are no help where an allocation was refused.

        Those are gaps between tensors, and a rest that is smaller than what the allocator asks the device for.
        """

    def resident_memory(self) -> int:
        """Bytes of host memory resident for this process."""

    def profiler(self, options: ProfilingConfig, worker: str) -> Any:
        """A profiler with `start` and `stop`, which writes the trace under the name `worker`."""

    def empty_cache(self) -> None:
        """Return cached blocks to the device."""

    def model(self) -> str:
        """What the device calls itself."""

    def group_options(self, description: str | None) -> Any:
        """Options for torch.distributed.new_group of a group that megatron describes so; None for the defaults."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Peak dense matrix-multiplication FLOP/s for `dtype`, None where no honest number is known."""
