"""Which experts a token goes to and with which weights: pure functions of the router's logits.

Legend: t tokens, e experts, k experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindspeed_llm.models.shape import ModelShape


def choose_experts(logits: Tensor, shape: ModelShape, score_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Scores are the softmax (over all experts, or over the chosen ones) or the sigmoid of the logits. The bias takes part
    in the choice alone. Sources: Mixtral, Qwen-MoE (softmax), DeepSeek-V2 (groups ranked by their best score),
    DeepSeek-V3 (sigmoid, bias, groups ranked by their two best).

    Args:
        logits: [t, e].
        shape: its moe_router_* fields and norm_topk_prob.
        score_bias: [e] fp32, or None.

    Returns:
        weights [t, k] in fp32 (fp64 for such logits), expert numbers [t, k].
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    softmax_later = shape.moe_router_score_function == "softmax" and not shape.moe_router_pre_softmax
    if softmax_later:
        scores = logits
    elif shape.moe_router_score_function == "softmax":
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = torch.sigmoid(logits)
    preferred = scores if score_bias is None else scores + score_bias
    experts = _best(preferred.detach(), shape)
    weights = scores.gather(1, experts)
    if softmax_later:
        weights = torch.softmax(weights, dim=-1)
    elif shape.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if shape.moe_router_topk_scaling_factor is not None:
        weights = weights * shape.moe_router_topk_scaling_factor
    return weights, experts


def _best(scores: Tensor, shape: ModelShape) -> Tensor:
    """[t, e] -> the k best experts [t, k], of the best groups where there are groups."""
    groups, topk = shape.moe_router_num_groups, shape.moe_router_topk
    if groups is None:
        return scores.topk(topk, dim=-1).indices
    chosen = shape.moe_router_group_topk
    summed = shape.moe_router_group_score_topk or max(topk // chosen, 1)
    grouped = scores.unflatten(1, (groups, -1))
    best = grouped.topk(summed, dim=-1).values.sum(dim=-1).topk(chosen, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1).topk(topk, dim=-1).indices


def routing_tables(weights: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[t, k] weights and expert numbers -> weights [t, e], zero elsewhere, and where they are, [t, e] bool."""
    size = (weights.shape[0], num_experts)
    probs = torch.zeros(size, dtype=weights.dtype, device=weights.device).scatter(1, experts, weights)
    return probs, torch.zeros(size, dtype=torch.bool, device=weights.device).scatter(1, experts, True)


def expert_capacity(num_tokens: int, shape: ModelShape, factor: float) -> int:
    """Tokens that an expert takes from one rank's micro-batch: `factor` times an even share, rounded up."""
    return math.ceil(num_tokens * shape.moe_router_topk / shape.num_moe_experts * factor)


def drop_tokens(probs: Tensor, routing_map: Tensor, capacity: int, policy: str, pad: bool) -> tuple[Tensor, Tensor]:
    """Keep at most `capacity` tokens of each expert.

    Args:
        probs, routing_map: [t, e].
        policy: "probs" keeps the tokens of the largest weight, "position" the first ones.
        pad: fill every expert up to its capacity (or all tokens) with tokens of weight zero.

    Returns:
        Both tables without what was dropped.
    """
    capacity = min(capacity, probs.shape[0])
    # Chosen tokens come before the others, which a stable sort leaves in their order.
    if policy == "probs":
        rank = torch.where(routing_map, probs.detach(), -1.0)
    else:
        rank = routing_map.to(probs.dtype)
    order = rank.argsort(dim=0, descending=True, stable=True)[:capacity]
    kept = torch.zeros_like(routing_map).scatter(0, order, True)
    if not pad:
        kept &= routing_map
    return probs * (kept & routing_map), kept
