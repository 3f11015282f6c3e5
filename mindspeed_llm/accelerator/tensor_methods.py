"""Methods of torch's classes that megatron calls and that no name in its modules leads to.

`tensor.cuda()`, `module.to("cuda")`, `tensor.is_cuda` and their like are changed on the classes while a facade is
installed; each acts only when the calling module sees the facade, and is torch's own for everybody else.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_llm.accelerator.protocol import Accelerator


def is_cuda(device: object) -> bool:
    """Whether `device` names CUDA: a string, a torch.device, or a bare index."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def on_accelerator(accelerator: Accelerator, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of `to`: a CUDA device, first or by name, becomes the accelerator's."""
    if args and is_cuda(args[0]):
        args = (accelerator.current_device(), *args[1:])
    if is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": accelerator.current_device()}
    return args, kwargs


def changes(accelerator: Accelerator, is_ours: Callable[[str], bool]) -> list[tuple[type, str, Any]]:
    """(class, name, new attribute) for every change.

    Args:
        is_ours: whether a module of that name sees the facade.
    """

    def called_by_ours() -> bool:
        return is_ours(sys._getframe(2).f_globals.get("__name__", ""))

    return [
        *_moving(accelerator, called_by_ours),
        *_copying(accelerator, called_by_ours),
        *_asking(accelerator, called_by_ours),
        *_pinning(accelerator, called_by_ours),
        *_making(accelerator, called_by_ours),
    ]


def _making(accelerator: Accelerator, called_by_ours: Callable[[], bool]) -> list[tuple[type, str, Any]]:
    """What takes `device=` and makes tensors: torch.nn's layers, `tensor.new_zeros` and its like, `module.to_empty`."""
    layers = {kind for kind in vars(torch.nn).values() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)}
    found = [(kind, "__init__") for kind in layers if "__init__" in vars(kind) and _takes_device(kind.__init__)]
    found += [(torch.Tensor, name) for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")]

    def on_device(function: Callable) -> Callable:
        @functools.wraps(function)
        def made(*args: Any, **kwargs: Any) -> Any:
            if is_cuda(kwargs.get("device")) and called_by_ours():
                kwargs["device"] = accelerator.current_device()
            return function(*args, **kwargs)

        return made

    to_empty = (torch.nn.Module, "to_empty")
    return [(kind, name, on_device(getattr(kind, name))) for kind, name in (*found, to_empty)]


def _takes_device(function: Callable) -> bool:
    return "device" in inspect.signature(function).parameters


def _moving(accelerator: Accelerator, called_by_ours: Callable[[], bool]) -> list[tuple[type, str, Any]]:
    found = []
    for owner in (torch.Tensor, torch.nn.Module):
        cuda, to = owner.cuda, owner.to

        def cuda_of(subject, *args: Any, _cuda=cuda, **kwargs: Any) -> Any:
            if not called_by_ours():
                return _cuda(subject, *args, **kwargs)
            return _spread(subject, subject.to(accelerator.current_device()))

        def to_of(subject, *args: Any, _to=to, **kwargs: Any) -> Any:
            if not called_by_ours():
                return _to(subject, *args, **kwargs)
            if _names_host(args, kwargs):
                return _apart(subject, _to(subject, *args, **kwargs))
            moves = is_cuda(kwargs.get("device")) or bool(args) and is_cuda(args[0])
            args, kwargs = on_accelerator(accelerator, args, kwargs)
            moved = _to(subject, *args, **kwargs)
            return _spread(subject, moved) if moves else moved

        found += [(owner, "cuda", functools.wraps(cuda)(cuda_of)), (owner, "to", functools.wraps(to)(to_of))]
    return found


def _copying(accelerator: Accelerator, called_by_ours: Callable[[], bool]) -> list[tuple[type, str, Any]]:
    """`tensor.cpu()`: where host and device are one, a copy all the same; see `_apart`."""
    cpu = torch.Tensor.cpu

    @functools.wraps(cpu)
    def cpu_of_tensor(tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = cpu(tensor, *args, **kwargs)
        return _apart(tensor, moved) if called_by_ours() else moved

    return [(torch.Tensor, "cpu", cpu_of_tensor)]


def _apart(tensor: Any, moved: Any) -> Any:
    """What was moved to the host, in memory of its own.

    megatron frees what it has copied so (`offload_to_cpu`) or goes on training it (checkpoints written beside it).
    """
    return moved.clone() if moved is tensor and isinstance(tensor, torch.Tensor) else moved


def _spread(tensor: Any, moved: Any) -> Any:
    """What was moved to the device: a copy where several of its elements are one in memory, or it was marked as host's.

    A program that moved an expanded tensor writes into its rows one by one. Any other tensor stays where it is: whether
    it was the device's before, so that no copy is due, cannot be told.
    """
    if moved is not tensor or not isinstance(tensor, torch.Tensor):
        return moved
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
    if overlaps and tensor.layout == torch.strided:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.clone() if is_of_host(tensor) else tensor


# An attribute of tensors that a program has put on the host, where host and device are one.
_HOST = "_mindspeed_llm_of_host"


def mark_of_host(tensor: torch.Tensor) -> None:
    """Let a program that asks `tensor.is_cuda` hear that this tensor is the host's."""
    setattr(tensor, _HOST, True)


def is_of_host(tensor: torch.Tensor) -> bool:
    """Whether `mark_of_host` has marked it."""
    return getattr(tensor, _HOST, False)


def _names_host(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `to` is told the host, by that word: as an object, the host is `torch.cuda.current_device()` as well."""
    named = args[0] if args else kwargs.get("device")
    return isinstance(named, str) and named == "cpu"


def _asking(accelerator: Accelerator, called_by_ours: Callable[[], bool]) -> list[tuple[type, str, Any]]:
    tensor_type, is_cuda_of = torch.Tensor.type, torch.Tensor.is_cuda

    @functools.wraps(tensor_type)
    def type_of_tensor(tensor, *args: Any, **kwargs: Any) -> Any:
        ours = called_by_ours()
        if ours and args and isinstance(args[0], str):
            args = (args[0].replace("torch.cuda.", "torch."), *args[1:])
        answer = tensor_type(tensor, *args, **kwargs)
        if ours and isinstance(answer, str) and tensor.device.type == accelerator.device_type:
            return "torch.cuda." + answer.rsplit(".", 1)[1]
        return answer

    def is_cuda_of_tensor(tensor) -> bool:
        if called_by_ours():
            return tensor.device.type == accelerator.device_type and not is_of_host(tensor)
        return is_cuda_of.__get__(tensor)

    return [(torch.Tensor, "type", type_of_tensor), (torch.Tensor, "is_cuda", property(is_cuda_of_tensor))]


def _pinning(accelerator: Accelerator, called_by_ours: Callable[[], bool]) -> list[tuple[type, str, Any]]:
    pin_memory = torch.Tensor.pin_memory

    @functools.wraps(pin_memory)
    def pin_memory_of_tensor(tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if called_by_ours() and not accelerator.supports_pin_memory:
            return tensor
        return pin_memory(tensor, *args, **kwargs)

    record_stream = torch.Tensor.record_stream

    @functools.wraps(record_stream)
    def record_stream_of_tensor(tensor, stream: Any) -> None:
        # Host memory is freed in program order, whatever queue reads it.
        if not (called_by_ours() and accelerator.device_type == "cpu"):
            record_stream(tensor, stream)

    return [
        (torch.Tensor, "pin_memory", pin_memory_of_tensor),
        (torch.Tensor, "record_stream", record_stream_of_tensor),
    ]
