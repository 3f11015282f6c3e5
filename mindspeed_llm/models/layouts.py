"""How megatron-core lays a tensor out: tensor-parallel slices of fused parts, vocabulary padding. Pure functions.

The unsharded mcore tensor is the common language of all formats:
  linear_qkv   rows [g, n/g + 2, d], parts interleaved by query group (`packing`)
  linear_fc1   rows [gate; up]; a tensor-parallel rank holds [gate_r; up_r], so its rows are not contiguous
  embeddings   rows of the true vocabulary; a rank's slice is padded with zero rows at the end
  experts      a tensor for each, local_experts.{e} with e counted over the whole model; a rank holds those of its
               expert-parallel rank, cut by expert tensor parallelism, one by one or stacked (weight1, weight2)
Everything works on torch tensors and numpy arrays alike; the same functions serve weights [rows, in], biases [rows]
and LoRA's B [rows, r].

Legend: g query groups, n heads, d head dim, h hidden, f feed-forward, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.packing import Array, concatenate, pack, part_rows, unpack, with_zero_rows
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import expert_index, is_mtp, without_numbers

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


def layout_of(name: str) -> TensorLayout:
    """The layout of an mcore tensor, e.g. "decoder.layers.3.mlp.linear_fc1.weight".

    Raises:
        UserError: the table does not know the tensor.
    """
    key = without_numbers(name)
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
