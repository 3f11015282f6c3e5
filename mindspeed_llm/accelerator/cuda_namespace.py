"""What `torch.cuda` means to megatron on an accelerator that is not CUDA: the same names, answered by the accelerator.

Anything not listed here is torch.cuda's own, so a feature with no counterpart (CUDA graphs, memory pools) fails with
torch's own message instead of pretending.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mindspeed_llm.accelerator.protocol import Accelerator


class _Generators(Mapping[int, torch.Generator]):
    """`torch.cuda.default_generators`: every index is the one generator of this process's device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __getitem__(self, index: int) -> torch.Generator:
        return self._accelerator.generator()

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self._accelerator.device_count()


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
        "empty_cache": accelerator.empty_cache,
    }


def _streams(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "Stream": type(accelerator.new_stream()),
        "Event": type(accelerator.new_event()),
        "stream": accelerator.stream,
        "StreamContext": accelerator.stream,
        "current_stream": lambda device=None: accelerator.current_stream(),
        "default_stream": lambda device=None: accelerator.current_stream(),
        "synchronize": lambda device=None: accelerator.synchronize(),
    }


# torch.cuda.<X>Tensor names a legacy type of the device; megatron keeps some in tuples for isinstance.
_TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "ByteTensor", "IntTensor", "LongTensor")


def names(accelerator: Accelerator) -> dict[str, Any]:
    """The attributes of `torch.cuda` that the accelerator answers."""
    nothing = types.SimpleNamespace(
        range_push=lambda message: 0, range_pop=lambda: 0, range=lambda message: contextlib.nullcontext()
    )
    answered: dict[str, Any] = {
        "is_available": accelerator.is_available,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_kwargs: call(),
        "current_device": accelerator.current_device,
        "device_count": accelerator.device_count,
        "set_device": lambda device: accelerator.set_device(device if isinstance(device, int) else device.index or 0),
        "device": _device_context,
        "get_device_capability": lambda device=None: (0, 0),
        "is_current_stream_capturing": lambda: False,
        "nvtx": nothing,
    }
    answered |= _streams(accelerator) | _random(accelerator) | _memory(accelerator)
    if accelerator.device_type == "cpu":
        answered |= {name: getattr(torch, name) for name in _TENSOR_TYPES}
    return answered
