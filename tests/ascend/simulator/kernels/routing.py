"""Mixture of experts: order tokens by expert and back, choose experts."""

from __future__ import annotations

import torch
from torch import Tensor

from simulator.kernels.registry import kernel, require


@kernel("npu_moe_token_permute")
def npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    """Tokens [T, H] sorted by expert, indices [T, K] -> rows [T K, H], and for token-major slot i its row."""
    require(not padded_mode, "npu_moe_token_permute", "padded_mode is not supported")
    require(indices.dtype in (torch.int32, torch.int64), "npu_moe_token_permute", f"indices are {indices.dtype}")
    experts_per_token = 1 if indices.dim() == 1 else indices.shape[1]
    require(experts_per_token <= 512, "npu_moe_token_permute", "more than 512 experts per token")
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = torch.arange(order.numel())
    wanted = num_out_tokens or 0
    count = min(wanted, flat.numel()) if wanted > 0 else flat.numel() + wanted
    return tokens[order[:count] // experts_per_token], row_of_slot.int()


def _rows_of_slots(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """The row of each slot, zeros for slots whose row was cut off."""
    index = row_of_slot.long()
    inside = index < rows.shape[0]
    taken = rows.float()[index.clamp_max(max(rows.shape[0] - 1, 0))]
    return taken.masked_fill(~inside.unsqueeze(-1), 0.0)


@kernel("npu_moe_token_permute_grad_v2")
def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK, padded_mode=False
):
    slots = _rows_of_slots(grad_permuted_tokens, sorted_indices)
    return slots.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


@kernel("_npu_moe_token_unpermute")
def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    """-> sum over a token's rows, weighted, and the rows once more for the backward pass."""
    require(not padded_mode, "npu_moe_token_unpermute", "padded_mode is not supported")
    experts_per_token = 1 if probs is None else probs.shape[1]
    slots = _rows_of_slots(permuted_tokens, sorted_indices).view(-1, experts_per_token, permuted_tokens.shape[-1])
    if probs is not None:
        slots = slots * probs.float().unsqueeze(-1)
    return slots.sum(1).to(permuted_tokens.dtype), permuted_tokens.clone()


@kernel("npu_moe_token_unpermute_grad_v2")
def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens, sorted_indices, permuted_tokens_size_0, permuted_tokens_dtype, probs=None,
    padded_mode=False, restore_shape=None, permuted_tokens=None,
):  # fmt: skip
    """-> gradients of the rows and, if any, of the weights."""
    index, grad = sorted_indices.long(), grad_unpermuted_tokens.float()
    weights = torch.ones(grad.shape[0], 1) if probs is None else probs.float()
    grad_rows = torch.zeros(permuted_tokens_size_0, grad.shape[1])
    grad_rows[index] = (grad[:, None] * weights[..., None]).flatten(0, 1)
    grad_rows = grad_rows.to(permuted_tokens_dtype)
    if probs is None:
        return grad_rows, grad.new_empty(0)
    slots = permuted_tokens.float()[index].view(-1, probs.shape[1], grad.shape[1])
    return grad_rows, (slots * grad[:, None]).sum(-1).to(probs.dtype)


@kernel("npu_moe_token_permute_with_routing_map")
def npu_moe_token_permute_with_routing_map(tokens, routing_map, *, probs=None, num_out_tokens=None, drop_and_pad=False):
    """Tokens [T, H] where routing_map [T, E] says so, expert by expert -> rows, their weights, row of each slot."""
    rule = "npu_moe_token_permute_with_routing_map"
    require(not drop_and_pad, rule, "drop_and_pad is not simulated")
    per_token = routing_map.long().sum(1)
    require(bool((per_token == per_token[:1]).all()), rule, "tokens have different numbers of experts")
    experts, rows = routing_map.bool().t().nonzero(as_tuple=True)
    weights = tokens.new_empty(0) if probs is None else probs.t()[experts, rows]
    return tokens[rows], weights, torch.argsort(rows, stable=True).int()


@kernel("npu_moe_token_permute_with_routing_map_grad")
def npu_moe_token_permute_with_routing_map_grad(
    permuted_token_out_grad, probs_grad, sorted_indices, routing_map, experts_num, tokens_num, drop_and_pad
):
    experts, rows = routing_map.bool().t().nonzero(as_tuple=True)
    grad = permuted_token_out_grad
    grad_tokens = torch.zeros(tokens_num, grad.shape[1]).index_add_(0, rows, grad.float()).to(grad.dtype)
    if probs_grad is None or probs_grad.numel() == 0:
        return grad_tokens, None
    grad_probs = torch.zeros(tokens_num, experts_num, dtype=probs_grad.dtype)
    grad_probs[rows, experts] = probs_grad
    return grad_tokens, grad_probs


@kernel("npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=0, renorm=0,
    norm_type=0, out_flag=False, routed_scaling_factor=1.0, eps=1e-20,
):  # fmt: skip
    """-> weights [T, k], experts int32 [T, k], normalised scores fp32 [T, E]."""
    require(x.shape[1] <= 2048, "npu_moe_gating_top_k", f"{x.shape[1]} experts exceed 2048")
    normalised = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    choice = normalised if bias is None else normalised + bias.float()
    if group_count > 1:
        grouped = choice.view(x.shape[0], group_count, -1)
        of_group = grouped.amax(-1) if group_select_mode == 0 else grouped.topk(2, -1)[0].sum(-1)
        chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(k_group, -1)[1], True)
        choice = choice.masked_fill(~chosen.repeat_interleave(grouped.shape[-1], 1), float("-inf"))
    experts = choice.topk(k, -1)[1]
    weights = normalised.gather(1, experts)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), normalised
