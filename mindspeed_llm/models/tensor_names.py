"""What an mcore tensor's name says: layer, prediction layer, expert; and the names of the same tensor elsewhere.

A name counts layers and experts over the whole model, or over those that a rank holds; it looks the same.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# A multi-token prediction layer: tensors of its own, and those of the layer inside it.
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_STACKED_EXPERTS = {".experts.weight1": "linear_fc1.weight", ".experts.weight2": "linear_fc2.weight"}
# A factor of the adapters of all local experts.
_STACKED_FACTORS = re.compile(r"\.experts\.(linear_fc[12]\.lora_.*)$")


def layer_index(name: str) -> int | None:
    """The layer number in an mcore name; None for tensors outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same name for another layer (global <-> local index)."""
    return _LAYER.sub(f"decoder.layers.{layer}.", name, count=1)


def is_mtp(name: str) -> bool:
    """Whether an mcore tensor belongs to a multi-token prediction layer; those live on the last pipeline stage."""
    return _MTP_LAYER.match(name) is not None


def expert_index(name: str) -> int | None:
    """The number of the routed expert in an mcore name; None for tensors outside the experts."""
    match = _EXPERT.search(name)
    return int(match.group(1)) if match else None


def with_expert(name: str, expert: int) -> str:
    """The same name for another expert (global <-> local index)."""
    return _EXPERT.sub(f".local_experts.{expert}.", name, count=1)


def held_experts(name: str, num_local: int, ep_rank: int) -> tuple[str, ...] | None:
    """Names in the whole model of the experts' tensors that a parameter of one expert-parallel rank holds.

    Args:
        name: of the parameter: a local expert's, or one that stacks all local experts: `...experts.weight1` and
            `weight2`, or a factor of their adapters, `...experts.linear_fc1.lora_A`.
        num_local: routed experts of each expert-parallel rank.
        ep_rank: expert-parallel rank.

    Returns:
        One name, or one for each slice of the stack in order; None for parameters outside the experts.
    """
    first = ep_rank * num_local
    if (index := expert_index(name)) is not None:
        return (with_expert(name, first + index),)
    stacks = [(suffix, linear) for suffix, linear in _STACKED_EXPERTS.items() if name.endswith(suffix)]
    if match := _STACKED_FACTORS.search(name):
        stacks = [(match[0], match[1])]
    for suffix, tensor in stacks:
        prefix = name.removesuffix(suffix) + ".experts.local_experts"
        return tuple(f"{prefix}.{expert}.{tensor}" for expert in range(first, first + num_local))
    return None


def is_stacked_experts(name: str) -> bool:
    """Whether a parameter stacks all local experts along its first dimension (grouped matrix products)."""
    return name.endswith(tuple(_STACKED_EXPERTS))


def stacked_expert_name(name: str) -> str:
    """The parameter that stacks all local experts' tensors of this kind, from one expert's name."""
    prefix, linear = _EXPERT.sub(".", name, count=1).split(".experts.")
    return prefix + next(suffix for suffix, kind in _STACKED_EXPERTS.items() if kind == linear)


def without_numbers(name: str) -> str:
    """What layers and experts of one kind share: the name without its layer's prefix and its expert's number."""
    return _EXPERT.sub(".local_experts.", _MTP_LAYER.sub("", _LAYER.sub("", name, count=1), count=1))
