"""Initial weights that depend on the seed and the tensor's name alone, not on how the model is cut up."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.layouts import full_shape, layout_of, shard
from mindspeed_llm.models.packing import pack, part_rows
from mindspeed_llm.models.tensor_names import held_experts, is_stacked_experts, layer_index, with_layer


def draw(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """fp32 normal numbers for the tensor called `name`, the same whatever else is drawn and in whatever order.

    Args:
        seed: of the run.
        name: of the tensor in the whole model.
        shape: its unsharded, unpadded dimensions.
        std: standard deviation.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initial_tensor(name: str, config: ModelConfig, seed: int) -> Tensor:
    """The unsharded, unpadded initial value of a tensor, by its name in the whole model (mcore's names).

    Norm weights are one, biases zero, matrices normal: init_method_std, and divided by sqrt(2 num_layers) for the two
    projections that end a residual branch, as in Megatron-LM. The parts of fused tensors (q, k, v; gate, up) are drawn
    each by itself.
    """
    shape = config.shape
    size = full_shape(name, shape)
    if name.endswith(".bias"):
        return torch.zeros(size)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(size)
    std = shape.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2.0 * shape.num_layers)
    packing = layout_of(name).packing
    rows = part_rows(packing, shape)
    if not rows:
        return draw(seed, name, size, std)
    parts = [draw(seed, f"{name}/{index}", (count, *size[1:]), std) for index, count in enumerate(rows)]
    return pack(parts, packing, shape)


def global_name(name: str, config: ModelConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> str:
    """The name in the whole model of a parameter of one pipeline stage: layers are counted from the first stage's."""
    layer = layer_index(name)
    if layer is None:
        return name
    return with_layer(name, layer + get_transformer_layer_offset(config, vp_stage, pp_rank))


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int) -> None:
    """Set every parameter of a model chunk (before LoRA or wrapping) to its initial value for `seed`."""
    config: ModelConfig = model.config
    rank, tp = model.tp_group.rank(), model.tp_group.size()
    for name, parameter in model.named_parameters():
        whole = global_name(name, config, model.vp_stage, model.pp_group.rank())
        if whole == "output_layer.weight" and config.shape.tie_word_embeddings:
            whole = "embedding.word_embeddings.weight"
        experts = _experts_of(whole, config)
        if experts is not None:
            parameter.copy_(_initial_experts(experts, is_stacked_experts(name), config, seed))
            continue
        full = initial_tensor(whole, config, seed)
        parameter.copy_(shard(full, whole, config.shape, rank, tp, config.padded_vocab_size))


def _experts_of(name: str, config: ModelConfig) -> tuple[str, ...] | None:
    """Names in the whole model of the experts' tensors that a parameter holds on this rank; None for other tensors."""
    if config.num_moe_experts is None:
        return None
    ep_rank, ep = parallel_state.get_expert_model_parallel_rank(), config.expert_model_parallel_size
    return held_experts(name, config.num_moe_experts // ep, ep_rank)


def _initial_experts(names: tuple[str, ...], stacked: bool, config: ModelConfig, seed: int) -> Tensor:
    """This rank's shards of the experts' tensors, stacked or (one name) as it is."""
    rank = parallel_state.get_expert_tensor_parallel_rank()
    size = parallel_state.get_expert_tensor_parallel_world_size()
    shards = [shard(initial_tensor(name, config, seed), name, config.shape, rank, size) for name in names]
    return torch.stack(shards) if stacked else shards[0]


def mark_tensor_parallel(model: nn.Module) -> None:
    """Say on each weight whether and along which dimension it is cut, which megatron's gradient norm goes by.

    megatron's layers do so while initialising, which they do not do here.
    """
    for name, parameter in model.named_parameters():
        layout = layout_of((held_experts(name, 1, 0) or (name,))[0])
        if layout.tp_dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            stride = 2 if layout.packing.endswith("gate_up") else 1
            dim = layout.tp_dim + is_stacked_experts(name)
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dim, stride)
