"""What the name `torch` means to megatron: torch's own names, except those that take or make a device."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mindspeed_llm.accelerator import host_random
from mindspeed_llm.accelerator.cuda_namespace import CudaNamespace
from mindspeed_llm.accelerator.distributed_namespace import DistributedNamespace, Overlay
from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.accelerator.tensor_methods import is_cuda

# Functions of torch that megatron calls with device="cuda" or with a device from its configuration.
_DEVICE_FUNCTIONS = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)


class TorchFacade(types.ModuleType):
    """torch as megatron sees it; see the module docstring."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch")
        self.__path__ = torch.__path__
        self.__spec__ = torch.__spec__
        self.__dict__["cuda"] = CudaNamespace(accelerator)
        self.__dict__["distributed"] = DistributedNamespace(accelerator)
        self._accelerator = accelerator
        self._functions = {name: self._on_device(getattr(torch, name), accelerator) for name in _DEVICE_FUNCTIONS}
        self.__dict__.update(self._functions)
        self.__dict__["device"] = _device_class(accelerator)
        self.__dict__["autocast"] = functools.partial(_autocast, accelerator)
        self.__dict__["compile"] = _no_compile
        self.__dict__["jit"] = Overlay(torch.jit, script=_no_compile)
        self.__dict__["amp"] = Overlay(torch.amp, autocast=self.__dict__["autocast"])
        self.__dict__["load"] = _load(accelerator)
        self.__dict__["Generator"] = _generator_class(accelerator)
        self.__dict__["set_default_device"] = _set_default_device(accelerator)
        if accelerator.device_type == "cpu":
            self.__dict__.update(host_random.names())
            self.__dict__["random"] = Overlay(torch.random, **host_random.names())
            self.__dict__["accelerator"] = _no_accelerator()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __dir__(self) -> Iterable[str]:
        return dir(torch)

    @staticmethod
    def _on_device(function: Callable, accelerator: Accelerator) -> Callable:
        @functools.wraps(function)
        def on_device(*args: Any, **kwargs: Any) -> Any:
            if is_cuda(kwargs.get("device")):
                kwargs["device"] = accelerator.current_device()
            if not accelerator.supports_pin_memory:
                kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return on_device


class _DeviceFunction:
    """A name of the facade: what it was given, and while torch's own name is bound to another function, that one.

    Somebody who replaces `torch.empty` for a while (unittest.mock, accelerate) replaces it for the program as well.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, facade: TorchFacade | None, owner: type) -> Any:
        if facade is None:
            return self
        given, theirs = vars(facade)[self.name], getattr(torch, self.name)
        if given is not facade._functions[self.name] or given.__wrapped__ is theirs:
            return given
        return facade._on_device(theirs, facade._accelerator)

    def __set__(self, facade: TorchFacade, value: Any) -> None:
        vars(facade)[self.name] = value


for _name in _DEVICE_FUNCTIONS:
    setattr(TorchFacade, _name, _DeviceFunction(_name))


def _device_class(accelerator: Accelerator) -> type:
    """`torch.device`, except that constructing a CUDA device gives the accelerator's; isinstance is torch.device's.

    Without an index it means, as CUDA's does, the device that is current when it is used: megatron has it in defaults
    of arguments, which are computed before a rank has chosen its device.
    """

    class DeviceType(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
            first = args[0] if args else kwargs.get("type", kwargs.get("device"))
            if first == "cuda" and len(args) + len(kwargs) == 1:
                return torch.device(accelerator.device_type)
            return accelerator.current_device() if is_cuda(first) else torch.device(*args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch.device)

    return DeviceType("device", (), {"__module__": "torch"})


def _autocast(accelerator: Accelerator, device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    return torch.autocast(accelerator.device_type if device_type == "cuda" else device_type, *args, **kwargs)


def _no_compile(function: Callable | None = None, **_options: Any) -> Callable:
    """torch.compile without compiling: it would need a C++ compiler on a CPU and seconds per function."""
    return function if function is not None else _no_compile


def _no_accelerator() -> Overlay:
    """`torch.accelerator` of a job on the CPU.

    torch's own names the device its build was made for, whether the machine has it or not: a CUDA build says `cuda` on
    a machine without one, and what megatron registers for that device (its batch-invariant kernels) is never called.
    """
    return Overlay(
        torch.accelerator,
        current_accelerator=lambda check_available=False: None,
        is_available=lambda: False,
        device_count=lambda: 0,
    )


def _load(accelerator: Accelerator) -> Callable:
    """`torch.load` that maps tensors to the accelerator where CUDA is named, and those that were saved on CUDA too."""

    @functools.wraps(torch.load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if is_cuda(map_location) or (map_location is None and accelerator.device_type == "cpu"):
            map_location = accelerator.current_device()
        return torch.load(f, map_location, *args, **kwargs)

    return load


def _generator_class(accelerator: Accelerator) -> type:
    """`torch.Generator`, on the accelerator where CUDA is named; isinstance is torch.Generator's."""

    class GeneratorType(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return torch.Generator(accelerator.current_device() if is_cuda(device) else device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch.Generator)

    return GeneratorType("Generator", (), {"__module__": "torch"})


def _set_default_device(accelerator: Accelerator) -> Callable:
    @functools.wraps(torch.set_default_device)
    def set_default_device(device: Any) -> None:
        torch.set_default_device(accelerator.current_device() if is_cuda(device) else device)

    return set_default_device
