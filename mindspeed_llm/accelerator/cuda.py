"""NVIDIA GPUs as an accelerator: torch.cuda behind our protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from mindspeed_llm.accelerator import profiling
from mindspeed_llm.accelerator.caching_memory import CachingMemory
from mindspeed_llm.config.profiling import ProfilingConfig

# Dense tensor-core FLOP/s of bf16/fp16 from NVIDIA's data sheets (without sparsity), keyed by a word of the device
# name; the SXM parts, since those in slots are slower, say so in theirs, and are left out rather than guessed.
PEAK_HALF_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}

IN_SLOTS = ("PCI", "NVL")


class CUDA(CachingMemory):
    """See `protocol.Accelerator`."""

    name = "cuda"
    device_type = "cuda"
    distributed_backend = "nccl"
    supports_pin_memory = True
    reduces_float64 = True

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def why_unavailable(self) -> str:
        return "" if self.is_available() else "torch sees no CUDA device here"

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def current_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def set_device(self, index: int) -> None:
        torch.cuda.set_device(index)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stream(self, stream: torch.cuda.Stream | None) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def stream_type(self) -> type:
        return torch.cuda.Stream

    def event_type(self) -> type:
        return torch.cuda.Event

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def new_event(self, enable_timing: bool = False) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=enable_timing)

    def generator(self) -> torch.Generator:
        return torch.cuda.default_generators[torch.cuda.current_device()]

    def memory_total(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    def profiler(self, options: ProfilingConfig, worker: str) -> Any:
        return profiling.torch_profiler(options, worker, "cuda")

    def model(self) -> str:
        return torch.cuda.get_device_name()

    def group_options(self, description: str | None) -> None:
        return None

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        name = torch.cuda.get_device_name()
        if dtype not in (torch.bfloat16, torch.float16) or any(word in name for word in IN_SLOTS):
            return None
        return next((flops for word, flops in PEAK_HALF_FLOPS.items() if word in name), None)
