"""Tensors of the simulated device as the host sees them: the same memory, another device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICE_TYPE = "npu"
LAZY = os.environ.get("ASCEND_SIMULATOR_LAZY") == "1"
_cann = ctypes.CDLL("libascendcl.so")


def run_current_stream() -> None:
    """Run what the current stream holds: a kernel submitted now comes after it."""
    if LAZY:
        _cann.simulator_run_stream(ctypes.c_void_p(torch.npu.current_stream().npu_stream))


def host_view(x: Tensor) -> Tensor:
    """A CPU tensor on the memory of x."""
    storage = x.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        memory = torch.UntypedStorage(0)
    else:
        memory = torch.frombuffer((ctypes.c_char * size).from_address(storage.data_ptr()), dtype=torch.uint8)
        memory = memory.untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride())


def is_on_device(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == DEVICE_TYPE


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, with its strides."""
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    host_view(out).copy_(x)
    return out


class _Call:
    """One call of a kernel: arguments to the host, results back to where they belong."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.originals: dict[int, Tensor] = {}
        self.storages: dict[int, Tensor] = {}
        self.views: list[Tensor] = []  # kept, or their ids would be given again
        self.on_host: list[Tensor] = []

    def to_host(self, x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == DEVICE_TYPE:
            self.device = x
            return torch.device("cpu")
        if not is_on_device(x):
            if isinstance(x, Tensor) and x.dim() > 0 and x.device.type == "cpu":
                self.on_host.append(x)
            return x
        self.device = x.device
        view = host_view(x)
        self.views.append(view)
        self.originals[id(view)] = x
        if view.untyped_storage().nbytes():
            self.storages[view.untyped_storage().data_ptr()] = x
        return view

    def to_device(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            return x
        if id(x) in self.originals:
            return self.originals[id(x)]
        base = self.storages.get(x.untyped_storage().data_ptr())
        if base is not None and x.untyped_storage().nbytes():  # the kernel returned a view of an argument
            return torch.as_strided(base, x.size(), x.stride(), x.storage_offset())
        return to_device(x, self.device or torch.device(DEVICE_TYPE, torch.npu.current_device()))


def on_host(kernel: Callable[..., Any], mixes: bool = False) -> Callable[..., Any]:
    """`kernel` of CPU tensors as one of tensors on the device; what it writes in place is written there.

    Args:
        mixes: whether some of its tensors may be on the host; numbers (tensors without dimensions) always may.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        run_current_stream()
        call = _Call()
        args, kwargs = tree_map(call.to_host, (args, kwargs))
        if call.views and call.on_host and not mixes:
            raise RuntimeError(f"expected all tensors to be on the same device, but found one on cpu and {call.device}")
        return tree_map(call.to_device, kernel(*args, **kwargs))

    return run
