"""Merging adapters into weights while a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mindspeed_llm.lora.tensors import AdapterTensors, module_of_part
from mindspeed_llm.models.layouts import layout_of
from mindspeed_llm.models.packing import pack
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import layer_index
from mindspeed_llm.plan.adapters import FUSED_PARTS, AdapterSettings, linear_sizes


def merging_transform(
    adapters: AdapterTensors, settings: AdapterSettings, shape: ModelShape, trained: Mapping[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """A function (mcore name, unsharded tensor) -> tensor with the adapter added in fp32 and rounded once.

    Args:
        trained: base tensors that were trained beside the adapters and take the place of the base's.
    """
    by_linear = {(layer, module_of_part(part)) for layer, part in adapters}
    sizes = linear_sizes(shape)

    def transform(name: str, tensor: Tensor) -> Tensor:
        module = name.rsplit(".", 2)[-2] if name.count(".") > 2 else ""
        layer, dtype = layer_index(name), tensor.dtype
        tensor = trained.get(name, tensor)
        if not name.endswith(".weight") or (layer, module) not in by_linear:
            return tensor.to(dtype)
        deltas = []
        for part in FUSED_PARTS[module]:
            adapter = adapters.get((layer, part))
            width, out = sizes[module][part]
            deltas.append(
                torch.zeros(out, width)
                if adapter is None
                else settings.scaling * (adapter.b.float() @ adapter.a.float())
            )
        delta = deltas[0] if len(deltas) == 1 else pack(deltas, layout_of(name).packing, shape)
        return (tensor.float() + delta).to(dtype)

    return transform


def count_linears(adapters: AdapterTensors, shape: ModelShape) -> tuple[int, int]:
    """(linears of megatron-core that adapters change, linears that could have one)."""
    changed = {(layer, module_of_part(part)) for layer, part in adapters}
    return len(changed), shape.num_layers * len(FUSED_PARTS)
