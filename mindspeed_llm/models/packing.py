"""How the logical parts of a fused tensor become one: query, key, value by query group; gate, then up. And back.

  linear_qkv   rows [g, n/g + 2, d]: for each query group its query heads, its key head, its value head
  linear_fc1   rows [gate; up]
Torch tensors and numpy arrays alike, of a whole model or of one tensor-parallel rank.

Legend: g query groups, n heads, d head dim, f feed-forward, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mindspeed_llm.models.shape import ModelShape

Array = TypeVar("Array")

# Packings of a linear_fc1 -> the shape's field with its intermediate size.
_GATE_UP = {
    "gate_up": "ffn_hidden_size",
    "expert_gate_up": "moe_ffn_hidden_size",
    "shared_gate_up": "moe_shared_expert_intermediate_size",
}


def part_rows(packing: str, shape: ModelShape) -> tuple[int, ...]:
    """Rows of each logical part of the unsharded tensor: (q, k, v), (gate, up); () for tensors of one part."""
    if packing == "qkv":
        kv = shape.num_query_groups * shape.kv_channels
        return (shape.num_attention_heads * shape.kv_channels, kv, kv)
    if packing in _GATE_UP:
        return (getattr(shape, _GATE_UP[packing]),) * (2 if shape.gated_linear_unit else 1)
    return ()


def pack_qkv(query: Array, key: Array, value: Array, num_groups: int) -> Array:
    """Interleave q, k and v by query group.

    Args:
        query: [n*d, ...]; key, value: [g*d, ...].
        num_groups: g, of these tensors (the local number for a slice).

    Returns:
        [g * (n/g + 2) * d, ...].
    """
    tail = query.shape[1:]
    grouped = [x.reshape(num_groups, x.shape[0] // num_groups, *tail) for x in (query, key, value)]
    return concatenate(grouped, 1).reshape(-1, *tail)


def unpack_qkv(qkv: Array, num_heads: int, num_groups: int, head_dim: int) -> tuple[Array, Array, Array]:
    """The inverse of `pack_qkv`: [g * (n/g + 2) * d, ...] -> q [n*d, ...], k and v [g*d, ...]."""
    tail, rows = qkv.shape[1:], num_heads // num_groups * head_dim
    grouped = qkv.reshape(num_groups, rows + 2 * head_dim, *tail)
    pieces = grouped[:, :rows], grouped[:, rows : rows + head_dim], grouped[:, rows + head_dim :]
    return tuple(piece.reshape(-1, *tail) for piece in pieces)


def pack_gate_up(gate: Array, up: Array) -> Array:
    """[f, ...] twice -> [2f, ...], gate first."""
    return concatenate([gate, up], 0)


def unpack_gate_up(gate_up: Array) -> tuple[Array, Array]:
    """The inverse of `pack_gate_up`."""
    half = gate_up.shape[0] // 2
    return gate_up[:half], gate_up[half:]


def pack(parts: Sequence[Array], packing: str, shape: ModelShape, tp: int = 1) -> Array:
    """Logical parts -> the mcore tensor of a model (tp=1) or of one rank (each part already cut to that rank)."""
    if packing == "qkv":
        return pack_qkv(*parts, num_groups=shape.num_query_groups // tp)
    return parts[0] if len(parts) == 1 else concatenate(list(parts), 0)


def unpack(tensor: Array, packing: str, shape: ModelShape, tp: int = 1) -> tuple[Array, ...]:
    """The inverse of `pack`: the logical parts of an unsharded tensor (tp=1) or of one rank's tensor."""
    if packing == "qkv":
        return unpack_qkv(tensor, shape.num_attention_heads // tp, shape.num_query_groups // tp, shape.kv_channels)
    if packing in _GATE_UP and shape.gated_linear_unit:
        return unpack_gate_up(tensor)
    return (tensor,)


def concatenate(arrays: list[Array], axis: int) -> Array:
    """`torch.cat` or `numpy.concatenate`, whichever fits."""
    if hasattr(arrays[0], "new_zeros"):  # a torch tensor, without importing torch for numpy users
        import torch

        return torch.cat(arrays, dim=axis)
    import numpy

    return numpy.concatenate(arrays, axis=axis)


def with_zero_rows(array: Array, count: int) -> Array:
    """`array` followed by `count` rows of zeros."""
    if count == 0:
        return array
    tail = tuple(array.shape[1:])
    if hasattr(array, "new_zeros"):
        return concatenate([array, array.new_zeros((count, *tail))], 0)
    import numpy

    return concatenate([array, numpy.zeros((count, *tail), dtype=array.dtype)], 0)
