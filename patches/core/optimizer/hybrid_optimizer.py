"""Patches of megatron.core.optimizer.cpu_offloading.hybrid_optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import tensor_methods
from mindspeed_llm.patching import Patch


def _is_of_device(param: Tensor) -> bool:
    return param.device.type == accelerator.current().device_type


def _on_host(param: Tensor) -> Tensor:
    copy = param.detach().to("cpu", copy=True)
    return copy.pin_memory() if accelerator.current().supports_pin_memory else copy


def _copies(params: list[Tensor], fraction: float) -> dict[Tensor, Tensor]:
    """The first parameters of the device, until they hold `fraction` of its elements, with copies on the host."""
    of_device = [param for param in params if _is_of_device(param)]
    limit = fraction * sum(param.numel() for param in of_device)
    copies, taken = {}, 0
    for param in of_device:
        if taken >= limit:
            break
        copies[param] = _on_host(param)
        taken += param.numel()
    return copies


def _groups_by_copies(self: Any, offload_fraction: float) -> tuple[Any, ...]:
    """The host's and the device's parameter groups; parameter -> copy, copy -> parameter, parameter -> copy in fp32."""
    offloaded = _copies([param for group in self.param_groups for param in group["params"]], offload_fraction)
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    in_fp32: dict[Tensor, Tensor] = {}
    for group in self.param_groups:
        members: dict[bool, list[Tensor]] = {True: [], False: []}
        for param in group["params"]:
            inner = offloaded.get(param, param)
            if self.param_update_in_fp32 and inner.dtype != torch.float32:
                inner = in_fp32[param] = inner.detach().clone().float()
                if param in offloaded:
                    offloaded[param] = inner
            members[param in offloaded or not _is_of_device(param)].append(inner)
        for on_host, found in members.items():
            if found:
                groups[on_host].append({**group, "params": found})
    return groups[True], groups[False], offloaded, {copy: param for param, copy in offloaded.items()}, in_fp32


def _with_the_hosts_states_marked(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def with_marks(self: Any) -> None:
        original(self)
        on_host = [optimizer for optimizer in self.sub_optimizers if optimizer is not self.gpu_optimizer]
        for state in (state for optimizer in on_host for state in optimizer.state.values()):
            for value in state.values():
                if isinstance(value, Tensor):
                    tensor_methods.mark_of_host(value)

    return with_marks


PATCHES = (
    Patch(
        name="offloaded-by-copy",
        target="megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer"
        "._get_sub_optimizer_param_groups",
        why="it tells the host's copies from the device's parameters by where they lie; where host and device are one, "
        "the copies get no gradients and offloaded parameters are never updated",
        replace=_groups_by_copies,
        fingerprints={"0.15.3": "91e8f3f25d98", "0.16.1": "91e8f3f25d98"},
    ),
    Patch(
        name="offloaded-states-are-the-hosts",
        target="megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer"
        "._sync_sub_optimizers_state_to_hdo",
        why="where host and device are one, a program that asks `is_cuda` cannot tell which states were offloaded",
        wrap=_with_the_hosts_states_marked,
        fingerprints={"0.15.3": "d86294975438", "0.16.1": "d86294975438"},
    ),
    Patch(
        name="offloaded-states-are-the-hosts-when-loaded",
        target="megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer"
        "._move_new_state_to_right_device",
        why="as offloaded-states-are-the-hosts, until the first step after a checkpoint was loaded",
        wrap=_with_the_hosts_states_marked,
        fingerprints={"0.15.3": "8d9862113741", "0.16.1": "8d9862113741"},
    ),
)
