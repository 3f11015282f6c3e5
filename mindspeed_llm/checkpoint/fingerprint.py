"""Which weights adapters were trained on: a few exact values of a model, the same in every file format and layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.source import TensorSource, part_sizes
from mindspeed_llm.models.tensor_names import layer_index

VALUES = 8
"""Values taken of a tensor."""


def fingerprint(source: TensorSource) -> dict[str, Any]:
    """Values of every tensor outside the layers and of one tensor of each layer, for a json record.

    Returns:
        {"parameters": count, "samples": {mcore name: {"dtype": "bfloat16", "values": [...]}}}; every value of a
        floating-point type of at most 32 bits is a json number exactly.
    """
    samples = {}
    for name in sampled_names(source):
        values = sample(source, name)
        samples[name] = {"dtype": str(values.dtype).removeprefix("torch."), "values": values.double().tolist()}
    return {"parameters": source.shape.num_parameters(), "samples": samples}


def sampled_names(source: TensorSource) -> Iterator[str]:
    """All tensors outside the layers; in layer i the i-th of its tensors, so that each kind is seen."""
    layers: dict[int, list[str]] = {}
    for name in source.names():
        layer = layer_index(name)
        if layer is None:
            yield name
        else:
            layers.setdefault(layer, []).append(name)
    for layer, names in layers.items():
        matrices = [name for name in names if len(source.dims(name)) > 1]
        yield matrices[layer % len(matrices)]


def sample(source: TensorSource, name: str) -> Tensor:
    """VALUES evenly spaced values of the middle of a tensor; no more of it is read than one row (column, group)."""
    pair, size = source.pairs[name], part_sizes(source.pairs[name], source.shape)[0]
    if pair.layout.tp_dim is None:
        piece = source.read(name)
    else:
        unit = size // source.shape.num_query_groups if pair.layout.packing == "qkv" else 1
        start = size // unit // 2 * unit
        piece = source.read_part(name, 0, start, start + unit)
    flat = piece.flatten()
    return flat[torch.linspace(0, flat.numel() - 1, VALUES).long()]


def first_difference(recorded: Mapping[str, Any], source: TensorSource) -> str | None:
    """What tells a model from the recorded one, or None when they are the same.

    A model that was rounded to another type on the way counts as the same: the narrower values must be the rounded
    wider ones.
    """
    if recorded["parameters"] != source.shape.num_parameters():
        return f"{recorded['parameters']:,} parameters, not {source.shape.num_parameters():,}"
    samples = recorded["samples"]
    for name in sampled_names(source):
        if name not in samples:
            return f"{name} is new"
        then = torch.tensor(samples[name]["values"], dtype=torch.float64).to(getattr(torch, samples[name]["dtype"]))
        now = sample(source, name)
        if not (torch.equal(now, then.to(now.dtype)) or torch.equal(then, now.to(then.dtype))):
            return f"other values in {name}"
    return None
