"""What `torch.distributed` means to megatron: groups asked for with nccl get the accelerator's backend."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_llm.accelerator import gloo_device
from mindspeed_llm.accelerator.premultiplied_sum import COLLECTIVES, premultiplied
from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.accelerator.tensor_methods import is_cuda

_MAKE_GROUPS = ("init_process_group", "new_group", "new_subgroups", "new_subgroups_by_enumeration")
# A tensor is cut into, or put together from, what the ranks hold.
_WITH_SHARES = ("all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor", "_reduce_scatter_base")


class Overlay(types.ModuleType):
    """A module of torch with some names replaced."""

    def __init__(self, module: types.ModuleType, **names: Any):
        super().__init__(module.__name__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class NcclOptions:
    """`torch.distributed.ProcessGroupNCCL.Options` where torch has none: holds what a program sets, for nobody."""

    def __init__(self, is_high_priority_stream: bool = False):
        self.is_high_priority_stream = is_high_priority_stream
        self.config = types.SimpleNamespace()

    def __copy__(self) -> NcclOptions:
        made = NcclOptions(self.is_high_priority_stream)
        made.config = copy.copy(self.config)
        return made


class DistributedNamespace(types.ModuleType):
    """`torch.distributed`, except that a group asked for with nccl gets the accelerator's backend."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch.distributed")
        self.__path__ = torch.distributed.__path__
        made = {name: getattr(torch.distributed, name) for name in _MAKE_GROUPS + _WITH_SHARES + tuple(COLLECTIVES)}
        made.update({name: _with_backend(made[name], accelerator) for name in _MAKE_GROUPS})
        made.update({name: _of_any_shape(made[name]) for name in _WITH_SHARES})
        made.update({name: premultiplied(name, made[name]) for name in COLLECTIVES})
        self.__dict__.update({name: _unless_replaced(name, function) for name, function in made.items()})
        mesh = torch.distributed.device_mesh
        self.__dict__["init_device_mesh"] = _on_accelerator(mesh.init_device_mesh, accelerator)
        self.__dict__["device_mesh"] = Overlay(
            mesh, init_device_mesh=self.init_device_mesh, DeviceMesh=_mesh_class(accelerator)
        )
        self.__dict__["DeviceMesh"] = self.device_mesh.DeviceMesh
        if not hasattr(torch.distributed, "ProcessGroupNCCL"):
            self.__dict__["ProcessGroupNCCL"] = types.SimpleNamespace(Options=NcclOptions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)


def _unless_replaced(name: str, ours: Callable) -> Callable:
    """`ours`, or what somebody has put in the place of torch's function of that name, as tests do."""
    theirs = getattr(torch.distributed, name)

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        found = getattr(torch.distributed, name)
        return (ours if found is theirs else found)(*args, **kwargs)

    return function


def _with_backend(function: Callable, accelerator: Accelerator) -> Callable:
    """What makes groups, with the accelerator's backend and options where nccl's are asked for."""
    signature = inspect.signature(function)
    ours = accelerator.distributed_backend

    def with_backend(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if isinstance(given.get("backend"), str):
            given["backend"] = _backend(given["backend"], accelerator)
        if given.get("backend") == ours and ours != "nccl" and _is_nccl_options(given.get("pg_options")):
            given["pg_options"] = None
        if given.get("backend") in (None, ours) and given.get("pg_options") is None and "group_desc" in given:
            given["pg_options"] = accelerator.group_options(given["group_desc"])
        if given.get("device_id") is not None:
            # torch binds groups to accelerators alone.
            given["device_id"] = None if accelerator.device_type == "cpu" else accelerator.current_device()
        with gloo_device.shared(given.get("ranks")):
            return function(*bound.args, **bound.kwargs)

    return with_backend


def _of_any_shape(function: Callable) -> Callable:
    """A collective between a tensor and its share, for which nccl asks numbers of elements and gloo shapes."""
    signature = inspect.signature(function)
    tensors = list(signature.parameters)[:2]  # their names differ between the collectives

    @functools.wraps(function)
    def collective(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        flat = all(given[name].is_contiguous() for name in tensors)
        if flat and torch.distributed.get_backend(given.get("group")) == "gloo":
            given.update({name: given[name].view(-1) for name in tensors})
        return function(*bound.args, **bound.kwargs)

    return collective


def _on_accelerator(function: Callable, accelerator: Accelerator) -> Callable:
    @functools.wraps(function)
    def on_accelerator(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return function(accelerator.device_type if is_cuda(device_type) else device_type, *args, **kwargs)

    return on_accelerator


def _mesh_class(accelerator: Accelerator) -> type:
    """`DeviceMesh`, of the accelerator's devices where CUDA is named; isinstance is DeviceMesh's."""
    mesh = torch.distributed.DeviceMesh

    class MeshType(type):
        def __call__(cls, device_type: str, *args: Any, **kwargs: Any) -> torch.distributed.DeviceMesh:
            return mesh(accelerator.device_type if is_cuda(device_type) else device_type, *args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, mesh)

        def __getattr__(cls, name: str) -> Any:
            return getattr(mesh, name)

    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> torch.distributed.DeviceMesh:
        return mesh.from_group(group, accelerator.device_type if is_cuda(device_type) else device_type, *args, **kwargs)

    return MeshType("DeviceMesh", (), {"__module__": mesh.__module__, "from_group": staticmethod(from_group)})


def _backend(asked: str, accelerator: Accelerator) -> str:
    """The backend of a group: `nccl`, and `cuda:nccl` in a list of device types, is the accelerator's."""
    if asked.lower() == "nccl":
        return accelerator.distributed_backend
    if "cuda:nccl" not in asked:
        return asked
    pairs = dict(pair.split(":") for pair in asked.split(","))
    pairs.pop("cuda")
    pairs[accelerator.device_type] = accelerator.distributed_backend
    return ",".join(f"{device}:{backend}" for device, backend in pairs.items())


def _is_nccl_options(options: object) -> bool:
    return "NCCL" in type(options).__qualname__ or isinstance(options, NcclOptions)
