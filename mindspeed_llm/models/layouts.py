"""How megatron-core lays a tensor out: fused parts, tensor-parallel slices, vocabulary padding. Pure functions.

The unsharded mcore tensor is the common language of all formats:
  linear_qkv   rows [g, n/g + 2, d]: for each query group its query heads, its key head, its value head
  linear_fc1   rows [gate; up]; a tensor-parallel rank holds [gate_r; up_r], so its rows are not contiguous
  embeddings   rows of the true vocabulary; a rank's slice is padded with zero rows at the end
  experts      a tensor for each, local_experts.{e} with e counted over the whole model; a rank holds those of its
               expert-parallel rank, cut by expert tensor parallelism, one by one or stacked (weight1, weight2)
Everything works on torch tensors and numpy arrays alike; the same functions serve weights [rows, in], biases [rows]
and LoRA's B [rows, r].

Legend: g query groups, n heads, d head dim, h hidden, f feed-forward, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape

Array = TypeVar("Array")

VOCAB_MULTIPLE = 128
"""Megatron's default `--make-vocab-size-divisible-by`."""


@dataclass(frozen=True)
class TensorLayout:
    """Where tensor parallelism cuts a tensor and which logical parts its rows hold.

    Args:
        tp_dim: 0 (column-parallel), 1 (row-parallel) or None (a full copy on every rank).
        packing: "whole"; "qkv" (three parts interleaved by query group); "gate_up", "expert_gate_up" and
            "shared_gate_up" (two parts one after the other on every rank, of a dense MLP, an expert, the shared
            experts); "vocab" (padded to a multiple of the ranks).
        expert: the tensor belongs to one routed expert, so "tensor parallel" means expert tensor parallel.
    """

    tp_dim: int | None
    packing: str = "whole"
    expert: bool = False


REPLICATED = TensorLayout(None)

# Packings of a linear_fc1 -> the shape's field with its intermediate size.
_GATE_UP = {
    "gate_up": "ffn_hidden_size",
    "expert_gate_up": "moe_ffn_hidden_size",
    "shared_gate_up": "moe_shared_expert_intermediate_size",
}

_LAYOUTS = {
    "embedding.word_embeddings.weight": TensorLayout(0, "vocab"),
    "output_layer.weight": TensorLayout(0, "vocab"),
    "decoder.final_layernorm.weight": REPLICATED,
    "decoder.final_layernorm.bias": REPLICATED,
    "input_layernorm.weight": REPLICATED,
    "input_layernorm.bias": REPLICATED,
    "pre_mlp_layernorm.weight": REPLICATED,
    "pre_mlp_layernorm.bias": REPLICATED,
    "self_attention.linear_qkv.weight": TensorLayout(0, "qkv"),
    "self_attention.linear_qkv.bias": TensorLayout(0, "qkv"),
    "self_attention.linear_proj.weight": TensorLayout(1),
    "self_attention.linear_proj.bias": REPLICATED,
    "self_attention.q_layernorm.weight": REPLICATED,
    "self_attention.k_layernorm.weight": REPLICATED,
    "self_attention.linear_q_proj.weight": TensorLayout(0),
    "self_attention.linear_q_down_proj.weight": REPLICATED,
    "self_attention.linear_q_up_proj.weight": TensorLayout(0),
    "self_attention.linear_kv_down_proj.weight": REPLICATED,
    "self_attention.kv_layernorm.weight": REPLICATED,
    "self_attention.linear_kv_up_proj.weight": TensorLayout(0),
    "mlp.linear_fc1.weight": TensorLayout(0, "gate_up"),
    "mlp.linear_fc1.bias": TensorLayout(0, "gate_up"),
    "mlp.linear_fc2.weight": TensorLayout(1),
    "mlp.linear_fc2.bias": REPLICATED,
    "mlp.router.weight": REPLICATED,
    "mlp.router.expert_bias": REPLICATED,
    "mlp.experts.local_experts.linear_fc1.weight": TensorLayout(0, "expert_gate_up", expert=True),
    "mlp.experts.local_experts.linear_fc2.weight": TensorLayout(1, expert=True),
    "mlp.shared_experts.linear_fc1.weight": TensorLayout(0, "shared_gate_up"),
    "mlp.shared_experts.linear_fc2.weight": TensorLayout(1),
    "mlp.shared_experts.gate_weight": REPLICATED,
}

_MTP_LAYOUTS = {
    "enorm.weight": REPLICATED,
    "hnorm.weight": REPLICATED,
    "eh_proj.weight": TensorLayout(0),
    "final_layernorm.weight": REPLICATED,
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# A multi-token prediction layer: tensors of its own, and those of the layer inside it.
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?")


_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_STACKED_EXPERTS = {".experts.weight1": "linear_fc1.weight", ".experts.weight2": "linear_fc2.weight"}


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
        name: of the parameter: a local expert's, or `...experts.weight1` and `weight2`, which stack all local experts.
        num_local: routed experts of each expert-parallel rank.
        ep_rank: expert-parallel rank.

    Returns:
        One name, or one for each slice of the stack in order; None for parameters outside the experts.
    """
    first = ep_rank * num_local
    if (index := expert_index(name)) is not None:
        return (with_expert(name, first + index),)
    for suffix, linear in _STACKED_EXPERTS.items():
        if name.endswith(suffix):
            prefix = name.removesuffix(suffix) + ".experts.local_experts"
            return tuple(f"{prefix}.{expert}.{linear}" for expert in range(first, first + num_local))
    return None


def is_stacked_experts(name: str) -> bool:
    """Whether a parameter stacks all local experts along its first dimension (grouped matrix products)."""
    return name.endswith(tuple(_STACKED_EXPERTS))


def stacked_expert_name(name: str) -> str:
    """The parameter that stacks all local experts' tensors of this kind, from one expert's name."""
    prefix, linear = _EXPERT.sub(".", name, count=1).split(".experts.")
    return prefix + next(suffix for suffix, kind in _STACKED_EXPERTS.items() if kind == linear)


def layout_of(name: str) -> TensorLayout:
    """The layout of an mcore tensor, e.g. "decoder.layers.3.mlp.linear_fc1.weight".

    Raises:
        UserError: the table does not know the tensor.
    """
    key = _EXPERT.sub(".local_experts.", _MTP_LAYER.sub("", _LAYER.sub("", name, count=1), count=1))
    if is_mtp(name) and key in _MTP_LAYOUTS:
        return _MTP_LAYOUTS[key]
    if key not in _LAYOUTS:
        raise UserError(f"tensor: {name!r} has no known layout; legal: {', '.join(sorted(_LAYOUTS))}")
    return _LAYOUTS[key]


def full_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Dimensions of the unsharded, unpadded mcore tensor."""
    h, d = shape.hidden_size, shape.kv_channels
    packing, f = _mlp_of(name, shape)
    rows = {
        "embedding.word_embeddings": (shape.vocab_size, h),
        "output_layer": (shape.vocab_size, h),
        "linear_qkv": (sum(part_rows("qkv", shape)), h),
        "linear_proj": (h, shape.num_attention_heads * shape.value_channels),
        "linear_fc1": (sum(part_rows(packing, shape)), h),
        "linear_fc2": (h, f),
        "q_layernorm": (d, None),
        "k_layernorm": (d, None),
        "eh_proj": (h, 2 * h),
    }
    if shape.multi_latent_attention:
        rows |= _latent_rows(shape)
    module, kind = name.rsplit(".", 1)
    if kind == "gate_weight":
        return (1, h)
    if module.endswith("mlp.router"):
        return (shape.num_moe_experts, h) if kind == "weight" else (shape.num_moe_experts,)
    out_features, in_features = rows.get(module, rows.get(module.rsplit(".", 1)[-1], (h, None)))
    if kind == "bias" or in_features is None:
        return (out_features,)
    return (out_features, in_features)


def _latent_rows(shape: ModelShape) -> dict[str, tuple[int | None, int | None]]:
    """(out, in) features of the modules of multi-head latent attention."""
    n, q_rank, kv_rank = shape.num_attention_heads, shape.q_lora_rank, shape.kv_lora_rank
    queries = n * shape.kv_channels
    return {
        "linear_q_proj": (queries, shape.hidden_size),
        "linear_q_down_proj": (q_rank, shape.hidden_size),
        "q_layernorm": (q_rank, None),
        "linear_q_up_proj": (queries, q_rank),
        "linear_kv_down_proj": (kv_rank + shape.qk_pos_emb_head_dim, shape.hidden_size),
        "kv_layernorm": (kv_rank, None),
        "linear_kv_up_proj": (n * (shape.qk_head_dim + shape.v_head_dim), kv_rank),
    }


def _mlp_of(name: str, shape: ModelShape) -> tuple[str, int | None]:
    """(packing of linear_fc1, intermediate size) of the MLP that a tensor belongs to."""
    if expert_index(name) is not None:
        return "expert_gate_up", shape.moe_ffn_hidden_size
    if ".shared_experts." in name:
        return "shared_gate_up", shape.moe_shared_expert_intermediate_size
    return "gate_up", shape.ffn_hidden_size


def local_shape(name: str, shape: ModelShape, tp: int, padded_vocab: int | None = None) -> tuple[int, ...]:
    """Dimensions of one tensor-parallel rank's tensor.

    Args:
        padded_vocab: rows of the padded vocabulary over all ranks; Megatron's default padding when not given.
    """
    dims = list(full_shape(name, shape))
    layout = layout_of(name)
    if layout.packing == "vocab":
        dims[0] = padded_vocab or padded_vocab_size(shape.vocab_size, tp)
    if layout.tp_dim is not None:
        dims[layout.tp_dim] //= tp
    return tuple(dims)


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


def padded_vocab_size(vocab_size: int, tp: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """The smallest multiple of `multiple * tp` that holds the vocabulary (Megatron's rule)."""
    step = multiple * tp
    return -(-vocab_size // step) * step


def shard_range(size: int, rank: int, tp: int) -> tuple[int, int]:
    """[start, stop) of one rank's contiguous share."""
    if size % tp:
        raise UserError(f"parallel: a dimension of {size} is not divisible by tensor-parallel-size={tp}")
    share = size // tp
    return rank * share, (rank + 1) * share


def vocab_range(vocab_size: int, padded_vocab: int, rank: int, tp: int) -> tuple[int, int, int]:
    """(start, stop, padding): the true rows of one rank, and how many zero rows follow them."""
    if padded_vocab < vocab_size or padded_vocab % tp:
        raise UserError(
            f"parallel: padded vocabulary {padded_vocab} is wrong; legal: a multiple of tensor-parallel-size={tp} not "
            f"below {vocab_size}"
        )
    share = padded_vocab // tp
    start = min(rank * share, vocab_size)
    stop = min((rank + 1) * share, vocab_size)
    return start, stop, share - (stop - start)


def shard(tensor: Array, name: str, shape: ModelShape, rank: int, tp: int, padded_vocab: int | None = None) -> Array:
    """One rank's tensor, cut from the unsharded one; the vocabulary is padded with zero rows.

    Args:
        padded_vocab: rows of the padded vocabulary over all ranks; Megatron's default padding when not given.

    Raises:
        UserError: the dimension is not divisible.
    """
    layout = layout_of(name)
    if layout.tp_dim is None:
        return tensor
    if layout.packing == "vocab":
        padded_vocab = padded_vocab or padded_vocab_size(shape.vocab_size, tp)
        start, stop, padding = vocab_range(shape.vocab_size, padded_vocab, rank, tp)
        return with_zero_rows(tensor[start:stop], padding)
    if layout.tp_dim == 1:
        start, stop = shard_range(tensor.shape[1], rank, tp)
        return tensor[:, start:stop]
    if not layout.expert:
        check_tensor_parallel(shape, tp)
    parts = unpack(tensor, layout.packing, shape)
    cut = [part[slice(*shard_range(part.shape[0], rank, tp))] for part in parts]
    return pack(cut, layout.packing, shape, tp)


def unshard(tensors: Sequence[Array], name: str, shape: ModelShape) -> Array:
    """The unsharded, unpadded tensor from all ranks' tensors, in rank order; replicated ones give the first."""
    layout, tp = layout_of(name), len(tensors)
    if layout.tp_dim is None:
        return tensors[0]
    if layout.packing == "vocab":
        return concatenate(list(tensors), 0)[: shape.vocab_size]
    if layout.tp_dim == 1:
        return concatenate(list(tensors), 1)
    by_rank = [unpack(tensor, layout.packing, shape, tp) for tensor in tensors]
    whole = [concatenate(list(part), 0) for part in zip(*by_rank)]
    return pack(whole, layout.packing, shape)


def check_tensor_parallel(shape: ModelShape, tp: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises:
        UserError: names the dimension and the legal sizes.
    """
    sizes = {
        "num_query_groups": shape.num_query_groups,
        "num_attention_heads": shape.num_attention_heads,
        "ffn_hidden_size": shape.ffn_hidden_size,
    }
    if shape.moe_shared_expert_intermediate_size is not None:
        sizes["moe_shared_expert_intermediate_size"] = shape.moe_shared_expert_intermediate_size
    for name, size in sizes.items():
        if tp < 1 or size % tp:
            legal = [n for n in range(1, shape.num_query_groups + 1) if all(s % n == 0 for s in sizes.values())]
            raise UserError(
                f"parallel: {name}={size} is not divisible by tensor-parallel-size={tp}; legal for this model: "
                f"{', '.join(map(str, legal))}"
            )


def check_expert_parallel(shape: ModelShape, ep: int, etp: int) -> None:
    """Refuse expert-parallel sizes that do not divide the experts.

    Raises:
        UserError: names the dimension and the legal sizes.
    """
    if shape.num_moe_experts is None:
        if ep > 1:
            raise UserError(f"parallel: expert-model-parallel-size={ep} is wrong, because the model has no experts")
        return
    for option, size, name, total in (
        ("expert-model-parallel-size", ep, "num_moe_experts", shape.num_moe_experts),
        ("expert-tensor-parallel-size", etp, "moe_ffn_hidden_size", shape.moe_ffn_hidden_size),
    ):
        if size < 1 or total % size:
            legal = [n for n in range(1, min(total, 256) + 1) if total % n == 0]
            raise UserError(
                f"parallel: {name}={total} is not divisible by {option}={size}; legal for this model: "
                f"{', '.join(map(str, legal))}"
            )


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
