"""What `torch.cuda` means to megatron on an accelerator that is not CUDA: the same names, answered by the accelerator.

CUDA graphs, memory pools and recordings of CUDA's allocator, which have no counterpart, are refused in one line when
they are made. Anything else not listed here is torch.cuda's own, which fails with torch's message instead of
pretending.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mindspeed_llm.accelerator.distributed_namespace import Overlay
from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.errors import UserError

# The generation of GPU a program is told of, which it derives features from: the first with bfloat16, without 8 bits.
CAPABILITY = (8, 0)


class _Generators(Mapping[int, torch.Generator]):
    """`torch.cuda.default_generators`: every index is the one generator of this process's device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __getitem__(self, index: int) -> torch.Generator:
        return self._accelerator.generator()

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return _device_count(self._accelerator)


def _device_count(accelerator: Accelerator) -> int:
    """Devices of this host; processes that share its CPUs each count as having one, numbered by LOCAL_RANK."""
    if accelerator.device_type != "cpu":
        return accelerator.device_count()
    return max(accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class CudaNamespace(types.ModuleType):
    """A stand-in for the module `torch.cuda`; see `names`."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch.cuda")
        self.__dict__.update(names(accelerator))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


@contextlib.contextmanager
def _device_context(device: object = None) -> Iterator[None]:
    """`with torch.cuda.device(i)`: this process has one current device, so there is nothing to switch."""
    yield


@contextlib.contextmanager
def _no_range(message: str, *_args: object) -> Iterator[None]:
    """`with torch.cuda.nvtx.range(...)`, also as a decorator: there is no profiler to tell."""
    yield


def _random(accelerator: Accelerator) -> dict[str, Any]:
    def get_rng_state(device: object = None) -> torch.Tensor:
        return accelerator.generator().get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        accelerator.generator().set_state(state)

    def manual_seed(seed: int) -> None:
        accelerator.generator().manual_seed(int(seed))

    random = types.SimpleNamespace(
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=manual_seed,
        manual_seed_all=manual_seed,
        initial_seed=lambda: accelerator.generator().initial_seed(),
    )
    return {
        "random": random,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "initial_seed": random.initial_seed,
        "default_generators": _Generators(accelerator),
    }


def _memory(accelerator: Accelerator) -> dict[str, Callable]:
    return {
        "memory_allocated": lambda device=None: accelerator.memory_allocated(),
        "max_memory_allocated": lambda device=None: accelerator.peak_memory_allocated(),
        "memory_reserved": lambda device=None: accelerator.memory_allocated(),
        "max_memory_reserved": lambda device=None: accelerator.peak_memory_allocated(),
        "reset_peak_memory_stats": lambda device=None: accelerator.reset_peak_memory(),
        "reset_max_memory_allocated": lambda device=None: accelerator.reset_peak_memory(),
        "memory_stats": lambda device=None: _memory_stats(accelerator),
        "mem_get_info": lambda device=None: _free_and_total(accelerator),
        "empty_cache": accelerator.empty_cache,
        "ipc_collect": lambda: None,
    }


def _recordings(answered: Mapping[str, Callable]) -> types.ModuleType:
    """`torch.cuda.memory`: what is answered of it, and what CUDA's allocator alone writes down refused."""
    names = ("_record_memory_history", "_snapshot", "_dump_snapshot")
    without = "leave recordings of the allocator off (--record-memory-history)"
    return Overlay(torch.cuda.memory, **answered, **{name: _refused(f"memory.{name}", without) for name in names})


def _memory_stats(accelerator: Accelerator) -> dict[str, int]:
    """The statistics of torch's caching allocator that the accelerator knows; each other key is 0."""
    now, peak = accelerator.memory_allocated(), accelerator.peak_memory_allocated()
    known = {f"{name}_bytes.all.current": now for name in ("allocated", "reserved", "active")}
    known |= {f"{name}_bytes.all.peak": peak for name in ("allocated", "reserved", "active")}
    return collections.defaultdict(int, known)


def _free_and_total(accelerator: Accelerator) -> tuple[int, int]:
    total = accelerator.memory_total()
    used = accelerator.resident_memory() if accelerator.device_type == "cpu" else accelerator.memory_allocated()
    return total - used, total


# What nvidia's management library measures. Megatron's straggler detector prints it beside its times.
_SENSORS = ("temperature", "power_draw", "utilization", "memory_usage", "clock_rate")


def _sensors() -> dict[str, Callable]:
    """Readings that no sensor gives here: not a number, where 0 would be taken for one."""
    return dict.fromkeys(_SENSORS, lambda device=None: math.nan)


def _refused(name: str, instead: str) -> type:
    """A class of torch.cuda that can be named and not made."""

    def refuse(cls: type, *_args: Any, **_kwargs: Any) -> None:
        raise UserError(
            f"torch.cuda.{name}: it cannot be made, because only a CUDA device has it; legal: none on this device; "
            f"try: {instead}"
        )

    return type(name, (), {"__new__": refuse, "__module__": "torch.cuda"})


def _graphs() -> dict[str, Any]:
    without_graphs = "leave CUDA graphs off (--enable-cuda-graph, --cuda-graph-impl)"
    refused = {name: _refused(name, without_graphs) for name in ("CUDAGraph", "graph", "make_graphed_callables")} | {
        name: _refused(name, "leave memory pools off (--nccl-ub)") for name in ("MemPool", "use_mem_pool")
    }
    return refused | {"graph_pool_handle": refused["CUDAGraph"], "graphs": types.SimpleNamespace(**refused)}


def _device_properties(accelerator: Accelerator) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=accelerator.name,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=accelerator.memory_total(),
        multi_processor_count=1,
    )


def _properties(accelerator: Accelerator) -> dict[str, Callable]:
    return {
        "get_device_properties": lambda device=None: _device_properties(accelerator),
        "get_device_name": lambda device=None: accelerator.name,
        "nccl": types.SimpleNamespace(version=lambda: (0, 0, 0), is_available=lambda tensors: False),
    }


def _streams(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "Stream": accelerator.stream_type(),
        "Event": accelerator.event_type(),
        "stream": accelerator.stream,
        "StreamContext": accelerator.stream,
        "current_stream": lambda device=None: accelerator.current_stream(),
        "default_stream": lambda device=None: accelerator.current_stream(),
        "synchronize": lambda device=None: accelerator.synchronize(),
    }


def _index(device: int | str | torch.device) -> int:
    """The number in 1, "cuda:1" or torch.device; 0 where there is none."""
    return device if isinstance(device, int) else torch.device(device).index or 0


# torch.cuda.<X>Tensor names a legacy type of the device; megatron keeps some in tuples for isinstance.
_TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "ByteTensor", "IntTensor", "LongTensor")


def names(accelerator: Accelerator) -> dict[str, Any]:
    """The attributes of `torch.cuda` that the accelerator answers.

    Making them asks the device nothing: before a rank has chosen its own, an answer would open the first one for all.
    """
    nothing = Overlay(
        torch.cuda.nvtx,
        range_push=lambda message: 0,
        range_pop=lambda: 0,
        range_start=lambda message: 0,
        range_end=lambda range_id: None,
        mark=lambda message: None,
        range=_no_range,
    )
    answered: dict[str, Any] = {
        "is_available": accelerator.is_available,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_kwargs: call(),
        "current_device": accelerator.current_device,
        "device_count": lambda: _device_count(accelerator),
        "set_device": lambda device: accelerator.set_device(_index(device)),
        "device": _device_context,
        "get_device_capability": lambda device=None: CAPABILITY,
        "is_current_stream_capturing": lambda: False,
        "nvtx": nothing,
    }
    memory = _memory(accelerator)
    answered |= _streams(accelerator) | _random(accelerator) | memory | {"memory": _recordings(memory)}
    answered |= _graphs() | _properties(accelerator) | _sensors()
    module = torch if accelerator.device_type == "cpu" else torch.get_device_module(accelerator.device_type)
    answered |= {name: getattr(module, name) for name in _TENSOR_TYPES if hasattr(module, name)}
    return answered
