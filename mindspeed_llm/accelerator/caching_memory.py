"""Memory of devices whose tensors torch's caching allocator keeps: the namespaces of CUDA and torch_npu count alike."""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_llm.accelerator import host_memory
from mindspeed_llm.accelerator.out_of_memory import SEGMENT_BYTES


class CachingMemory:
    """The methods of `protocol.Accelerator` about memory, but `memory_total`, for `torch.<name>`."""

    name: str

    def __init__(self) -> None:
        self._highest_before = 0

    @property
    def _device(self) -> Any:
        return getattr(torch, self.name)

    def memory_allocated(self) -> int:
        return self._device.memory_allocated()

    def peak_memory_allocated(self) -> int:
        return self._device.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        self._highest_before = self.highest_memory_allocated()
        self._device.reset_peak_memory_stats()

    def highest_memory_allocated(self) -> int:
        return max(self._highest_before, self.peak_memory_allocated())

    def memory_room(self) -> int:
        return self._device.mem_get_info()[0] + self._device.memory_reserved() - self._device.memory_allocated()

    def memory_in_pieces(self) -> int:
        gaps = self._device.memory_reserved() - self._device.memory_allocated()
        return gaps + min(self._device.mem_get_info()[0], SEGMENT_BYTES)

    def resident_memory(self) -> int:
        return host_memory.resident_bytes()

    def empty_cache(self) -> None:
        self._device.empty_cache()
