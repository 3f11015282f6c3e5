"""Mixture of experts: order tokens by expert and back, choose experts."""

from __future__ import annotations

import torch
from torch import Tensor

from simulator.kernels.registry import kernel, require

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


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


@kernel("_npu_moe_token_unpermute_with_routing_map")
def npu_moe_token_unpermute_with_routing_map(
    permuted_tokens, sorted_indices, restore_shape, *, probs=None, routing_map=None, drop_and_pad=False
):
    """Rows [r, H], for slot i of each token its row or -1 -> sums over a token's slots [T, H]; three for its backward.

    torch_npu's operator without the underscore calls it and keeps the first.
    """
    rule = "npu_moe_token_unpermute_with_routing_map"
    require(probs is None and routing_map is None, rule, "weights are not simulated")
    require(not drop_and_pad, rule, "drop_and_pad is not simulated")
    require(permuted_tokens.dtype in FLOATS, rule, f"{permuted_tokens.dtype} is not float16, bfloat16 or float32")
    require(sorted_indices.dtype == torch.int32 and sorted_indices.dim() == 1, rule, "slots must be int32 [T K]")
    tokens, hidden = restore_shape
    require(hidden == permuted_tokens.shape[1], rule, f"restore_shape {restore_shape}")
    require(sorted_indices.numel() % tokens == 0, rule, f"{sorted_indices.numel()} slots for {tokens} tokens")
    require(sorted_indices.numel() // tokens <= 512, rule, "more than 512 experts per token")
    unused = sorted_indices < 0
    index = sorted_indices.long().masked_fill(unused, 0)
    slots = permuted_tokens.float()[index].masked_fill(unused.unsqueeze(-1), 0.0)
    out = slots.view(tokens, -1, hidden).sum(1).to(permuted_tokens.dtype)
    return out, sorted_indices.clone(), sorted_indices.clone(), None


MOST_EXPERTS = 2048


def _check_gating(rule: str, x: Tensor, k: int, most: int) -> None:
    require(x.dtype in FLOATS, rule, f"{x.dtype} is not float16, bfloat16 or float32")
    require(1 <= k <= most, rule, f"k = {k} is not in [1, {most}]")


@kernel("npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=0, renorm=0,
    norm_type=0, out_flag=False, routed_scaling_factor=1.0, eps=1e-20,
):  # fmt: skip
    """-> weights [T, k], experts int32 [T, k], normalised scores fp32 [T, E] if they are asked for."""
    rule, experts_of_group = "npu_moe_gating_top_k", x.shape[1] // group_count
    _check_gating(rule, x, k, experts_of_group * k_group)
    require(x.dim() == 2 and x.shape[1] <= MOST_EXPERTS, rule, f"{x.shape[1]} experts exceed {MOST_EXPERTS}")
    require(x.shape[1] % group_count == 0 and experts_of_group > 2, rule, f"{group_count} groups of {x.shape[1]}")
    require(-(-experts_of_group // 32) * 32 * group_count <= MOST_EXPERTS, rule, f"{group_count} groups")
    require(1 <= k_group <= group_count, rule, f"k_group {k_group}")
    require(renorm == 0 and norm_type in (0, 1), rule, f"renorm {renorm}, norm_type {norm_type}")
    require(input_ids is None and tid2eid is None, rule, "choice by table is not simulated")
    require(bias is None or (bias.dtype == x.dtype and bias.shape == x.shape[1:]), rule, "bias is not like x")
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
    if not out_flag:  # its memory is not written
        normalised = torch.full_like(normalised, float("nan"))
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), normalised


@kernel("npu_moe_gating_top_k_softmax_v2")
def npu_moe_gating_top_k_softmax_v2(x, *, k=1, finished=None, renorm=0, output_softmax=False):
    """-> weights [T, k], experts int32 [T, k], softmax over all experts if asked for; renorm: softmax of the chosen."""
    rule = "npu_moe_gating_top_k_softmax_v2"
    _check_gating(rule, x, k, min(x.shape[-1], 1024))
    require(finished is None, rule, "finished is not simulated")
    scores = x.float() if renorm else x.float().softmax(-1)
    weights, experts = scores.topk(k, -1)
    if renorm:
        weights = weights.softmax(-1)
    return weights.to(x.dtype), experts.int(), scores if output_softmax and not renorm else torch.empty(0)
