"""Merging adapters into weights while a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mindspeed_llm.lora.tensors import AdapterTensors
from mindspeed_llm.models.packing import pack, unpack
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_linears, adaptable_modules, module_of
from mindspeed_llm.plan.adapters import AdapterSettings


def merging_transform(
    adapters: AdapterTensors, settings: AdapterSettings, shape: ModelShape, trained: Mapping[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """A function (mcore name, unsharded tensor) -> tensor with the adapter added in fp32 and rounded once.

    Args:
        trained: base tensors that were trained beside the adapters and take the place of the base's.
    """
    linears, adapted = adaptable_modules(shape), {path for path, _ in adapters}

    def transform(name: str, tensor: Tensor) -> Tensor:
        path, dtype = name.removesuffix(".weight"), tensor.dtype
        tensor = trained.get(name, tensor)
        if path == name or path not in adapted:
            return tensor.to(dtype)
        delta = weight_delta(path, linears[module_of(path)], adapters, settings, shape)
        merged = tensor.float() + delta
        if settings.use_dora:
            merged = with_magnitudes(merged, path, linears[module_of(path)], adapters, shape)
        return merged.to(dtype)

    return transform


def weight_delta(
    path: str, linear: Adaptable, adapters: AdapterTensors, settings: AdapterSettings, shape: ModelShape
) -> Tensor:
    """What the adapters of one linear add to its weight: fp32, of the unsharded, unpadded weight's shape."""
    deltas = []
    for part, (width, out) in linear.parts.items():
        adapter = adapters.get((path, part))
        if adapter is None:
            deltas.append(torch.zeros(out, width))
            continue
        deltas.append(settings.scaling_of(linear.module, part) * (adapter.b.float() @ adapter.a.float()))
    delta = pack(deltas, linear.packing, shape)
    # An embedding's rows are what goes in.
    return delta.t() if linear.module == "word_embeddings" else delta


def with_magnitudes(
    merged: Tensor, path: str, linear: Adaptable, adapters: AdapterTensors, shape: ModelShape
) -> Tensor:
    """Weight and adapter together, each output scaled to its magnitude where the part has adapters (DoRA)."""
    if linear.module == "word_embeddings":  # its outputs are the columns
        return _rows_with_magnitudes(merged.t(), path, linear, adapters, shape).t()
    return _rows_with_magnitudes(merged, path, linear, adapters, shape)


def _rows_with_magnitudes(
    merged: Tensor, path: str, linear: Adaptable, adapters: AdapterTensors, shape: ModelShape
) -> Tensor:
    parts = list(unpack(merged, linear.packing, shape))
    for number, part in enumerate(linear.parts):
        if (path, part) in adapters:
            norms = torch.linalg.vector_norm(parts[number], dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            parts[number] = parts[number] * (adapters[path, part].magnitude.float() / norms)[:, None]
    return pack(parts, linear.packing, shape)


def count_linears(adapters: AdapterTensors, shape: ModelShape) -> tuple[int, int]:
    """(linears of megatron-core that adapters change, linears of the layers that could have one)."""
    possible = sum(linear.count for linear in adaptable_linears(shape) if linear.layers is not None)
    return len({path for path, _ in adapters}), possible
