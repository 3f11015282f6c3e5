"""Adapter tensors of a whole model, independent of layout: by layer and part, as PEFT names them too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.names import plain_name
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.layouts import layout_of
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adapters import FUSED_PARTS, AdapterSettings, linear_sizes

BLOCKS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}


# What a model's own tensors begin with; optimizer, schedule and random states have other names.
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


@dataclass
class PartAdapter:
    """The adapter of one part of one layer's linear: A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor


AdapterTensors = dict[tuple[int, str], PartAdapter]
"""(layer, part such as "q_proj") -> its adapter; parts that share A hold equal copies."""


def module_of_part(part: str) -> str:
    """The megatron-core linear that a part belongs to."""
    return next(module for module, parts in FUSED_PARTS.items() if part in parts)


def adapted_parts(settings: AdapterSettings) -> Iterator[tuple[str, str]]:
    """(module, part) pairs that have an adapter."""
    for module, parts in settings.targets.items():
        for part in parts or FUSED_PARTS[module]:
            yield module, part


def read_adapters(directory: Path, shape: ModelShape, settings: AdapterSettings) -> AdapterTensors:
    """Adapters of a checkpoint written by a LoRA run, whatever its layout was.

    Raises:
        UserError: tensors are missing or of other sizes.
    """
    whole = _read_model_tensors(directory, shape.num_layers, lambda key: ".lora_" in key)
    adapters: AdapterTensors = {}
    for layer in range(shape.num_layers):
        for module, part in adapted_parts(settings):
            path = f"decoder.layers.{layer}.{BLOCKS[module]}.{module}"
            try:
                a, b = whole[f"{path}.lora_A"], whole[f"{path}.lora_B.{part}"]
            except KeyError as missing:
                raise UserError(
                    f"lora: {directory} has no tensor {missing}; the checkpoint is incomplete; try: copy it again"
                ) from None
            chosen = settings.targets[module]
            if chosen:
                start = chosen.index(part) * settings.rank
                a = a[start : start + settings.rank]
            adapters[layer, part] = PartAdapter(a, b)
    check_sizes(adapters, shape, settings, str(directory))
    return adapters


def read_trained_base(directory: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Base tensors that a LoRA run trained beside its adapters (`--trainable`), by mcore name, unsharded and unpadded.

    They are worth as much as the adapters: whoever uses one must use the other.
    """
    whole = _read_model_tensors(directory, shape.num_layers, lambda key: ".lora_" not in key)
    trained = {plain_name(key): tensor for key, tensor in whole.items()}
    return {
        name: tensor[: shape.vocab_size] if layout_of(name).packing == "vocab" else tensor
        for name, tensor in trained.items()
    }


def _read_model_tensors(directory: Path, num_layers: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The model's tensors (no optimizer state) in a torch_dist checkpoint, each layer's under its own name."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if key.startswith(MODEL_PREFIXES) and isinstance(stored, TensorStorageMetadata) and wanted(key)
    }
    load(state, storage_reader=FileSystemReader(str(directory)), no_dist=True)
    return _unstack(state, num_layers)


def _unstack(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """megatron-core stores equal layers as one tensor with a leading layer axis; give each layer its own name."""
    whole = {}
    for key, tensor in state.items():
        if not re.match(r"decoder\.layers\.\D", key):
            whole[key] = tensor
            continue
        for layer in range(num_layers):
            whole[key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)] = tensor[layer]
    return whole


def check_sizes(adapters: AdapterTensors, shape: ModelShape, settings: AdapterSettings, origin: str) -> None:
    """Refuse adapters that are not for this model.

    Raises:
        UserError: names the first one that does not fit.
    """
    sizes = linear_sizes(shape)
    expected = {(layer, part) for layer in range(shape.num_layers) for _, part in adapted_parts(settings)}
    if expected != set(adapters):
        odd = sorted(expected ^ set(adapters))[0]
        raise UserError(f"lora: {origin} and its settings disagree on layer {odd[0]} {odd[1]}")
    for (layer, part), adapter in adapters.items():
        width, out = sizes[module_of_part(part)][part]
        for name, tensor, size in (("A", adapter.a, (settings.rank, width)), ("B", adapter.b, (out, settings.rank))):
            if tuple(tensor.shape) != size:
                raise UserError(
                    f"lora: {name} of layer {layer} {part} in {origin} is {tuple(tensor.shape)}, "
                    f"and this model and rank {settings.rank} need {size}"
                )
