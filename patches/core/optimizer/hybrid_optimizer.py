"""Patches of megatron.core.optimizer.cpu_offloading.hybrid_optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.patching import Patch


def _is_of_device(param: Tensor) -> bool:
    return param.device.type == accelerator.current().device_type


def _on_host(param: Tensor) -> Tensor:
    copy = param.detach().clone().cpu()
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
)
